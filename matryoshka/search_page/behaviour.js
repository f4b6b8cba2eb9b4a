import { address, breakable, byId, count, make } from "./dom.js";
import { makeMap } from "./map.js";
import { makeViewer } from "./viewer.js";

(() => {
  const time = (ms) => `${Number(ms.toPrecision(2)).toLocaleString("en", { maximumFractionDigits: 6 })} ms`;
  let info = null;    // the answer of /api/index
  let asked = null;   // the present query: {row} or {query, picture}
  let choice = {};   // values of the sliders
  let view = { k: 10, classes: [] };  // number of neighbours, names of the only classes to find
  let known = new Set();  // the classes of the index
  let shown = null;   // the answer that the page shows

  // Light and dark: the system's choice until the button is used.
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // ------------------------------------------------------------ the server

  const showError = (message) => {
    byId("error").textContent = message;
    byId("error").hidden = !message;
  };

  async function ask(address, options = {}) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer.");
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(sentence(content.error || `The server answered ${answer.status}.`));
    return content;
  }

  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

  // Only the latest request of a kind counts: a new one aborts the one before.
  function latest(work) {
    let running = null;
    return async (...args) => {
      if (running) running.abort();
      const controller = new AbortController();
      running = controller;
      try {
        await work(controller.signal, ...args);
        if (running === controller) showError("");
      } catch (error) {
        if (error.name !== "AbortError" && running === controller) showError(error.message);
      } finally {
        if (running === controller) running = null;
      }
    };
  }

  const query = () => (asked.row === undefined ? { query: asked.query } : { row: asked.row });
  const parameters = () => {
    const all = new URLSearchParams({ ...query(), k: view.k, ...choice });
    for (const name of view.classes) all.append("class", name);
    return all;
  };

  // The address of the page: an upload is not in it, the rest of a search is.
  function pageAddress(next) {
    const all = new URLSearchParams();
    if (next?.row !== undefined) all.set("row", next.row);
    if (view.k !== info.neighbours) all.set("k", view.k);
    for (const name of view.classes) all.append("class", name);
    return `${location.pathname}${all.size ? `#${all}` : ""}`;
  }

  // Reads k and the classes from the address; returns its row, or null.
  function readAddress() {
    const all = new URLSearchParams(location.hash.slice(1));
    const k = Number(all.get("k"));
    view.k = Number.isInteger(k) && k >= 1 && k <= info.most_neighbours ? k : info.neighbours;
    view.classes = [...new Set(all.getAll("class"))].filter((name) => known.has(name));
    showView();
    return /^\d+$/.test(all.get("row") ?? "") ? Number(all.get("row")) : null;
  }

  // ------------------------------------------------------------ the index

  async function loadIndex(signal) {
    info = await ask("/api/index", { signal });
    const model = [info.model.arch, info.model.head.toUpperCase()].filter(Boolean).join(" ");
    const classes = info.classes ? ` of ${count(info.classes)} classes` : "";
    byId("title").textContent = info.name || "Search by prefix";
    document.title = `${info.name || "Search"} – Matryoshka`;
    byId("headline").replaceChildren(`${count(info.rows)} images${classes}, ${info.columns} dimensions${model ? `, ${model}` : ""}`,
      ...(info.certificate ? `; ${info.certificate}` : "").split("`").map((text, i) => i % 2 ? make("code", "", text) : text));
    byId("note").hidden = info.pictures;
    byId("note").textContent = "The data set of the pictures was not found, so names are shown. "
      + "Start the server with --data to give its path.";
    byId("exact-of").textContent = ` search, ${info.columns} dimensions`;
    byId("shortlist-of").textContent = `by ${info.shortlist.dim} dimensions`;
    byId("nprobe-of").textContent = `of ${count(info.nprobe.high)}`;
    byId("nprobe-row").hidden = !info.nprobe.high;
    byId("rerank-row").hidden = info.rerank.dims.length < 2;
    byId("rerank").max = info.rerank.dims.length - 1;
    byId("fast").hidden = info.exact_only;
    byId("panels").classList.toggle("single", info.exact_only);
    byId("k").max = info.most_neighbours;
    const list = info.classes ? (await ask("/api/classes", { signal })).classes : [];
    known = new Set(list.map((one) => one.name));
    byId("class-list").replaceChildren(...list.map((one) => {
      const option = make("option");
      option.value = one.name;
      option.label = `${one.name}, ${count(one.rows)} images`;
      return option;
    }));
    byId("filter").hidden = list.length < 2;
    view.classes = view.classes.filter((name) => known.has(name));
    reset();
    showView();
    map.open(info);
  }

  // ------------------------------------------------------------ k and classes

  function showView() {
    if (Number(byId("k").value) !== view.k) byId("k").value = view.k;
    byId("recall-of").textContent = `recall@${view.k}`;
    byId("legend").textContent = `also among the ${view.k} nearest by all ${info.columns} dimensions`;
    byId("class").placeholder = view.classes.length ? "one more class" : "all classes";
    byId("chosen").replaceChildren(...view.classes.map((name) => {
      const chip = make("button", "chip"), text = make("span", "", name);
      chip.type = "button";
      chip.title = `${name}: remove`;
      chip.append(text, make("span", "cross", "×"));
      chip.setAttribute("aria-label", `Remove the class ${name}`);
      chip.addEventListener("click", () => {
        setView({ classes: view.classes.filter((other) => other !== name) });
        byId("class").focus();
      });
      return chip;
    }));
  }

  function setView(change) {
    view = { ...view, ...change };
    showView();
    if (!asked) return;
    history.replaceState(asked, "", pageAddress(asked));
    search();
  }

  let typing = 0;
  byId("k").addEventListener("input", () => {
    clearTimeout(typing);
    const k = byId("k").valueAsNumber;
    if (!info || !byId("k").checkValidity() || !Number.isInteger(k) || k === view.k) return;
    typing = setTimeout(() => setView({ k }), 250);  // 1, then 10: one search
  });
  byId("k").addEventListener("change", () => {
    if (!info) return;
    clearTimeout(typing);
    const k = Math.round(Math.min(info.most_neighbours, Math.max(1, byId("k").valueAsNumber || info.neighbours)));
    byId("k").value = k;
    if (k !== view.k) setView({ k });
  });
  const addClass = () => {
    const name = byId("class").value;
    if (!known.has(name)) return;
    byId("class").value = "";
    if (!view.classes.includes(name)) setView({ classes: [...view.classes, name] });
  };
  // A choice from the list is an event without the text of a key.
  byId("class").addEventListener("input", (event) => { if (event.inputType !== "insertText" && !event.inputType?.startsWith("delete")) addClass(); });
  byId("class").addEventListener("change", addClass);

  // ------------------------------------------------------------ sliders

  const scales = {
    shortlist: () => [info.shortlist.low, info.shortlist.high],
    nprobe: () => [1, Math.max(1, info.nprobe.high)],
  };
  const round = (value) => {  // to two digits: 200 rather than 203
    const unit = 10 ** Math.max(0, Math.floor(Math.log10(value)) - 1);
    return Math.round(value / unit) * unit;
  };

  // Shortlists and lists span powers of ten: their sliders, 0 to 100, are logarithmic.
  function sliderPosition(id) {
    if (id === "rerank") return info.rerank.dims.indexOf(choice.rerank);
    const [low, high] = scales[id]();
    return high > low ? Math.round(100 * Math.log(choice[id] / low) / Math.log(high / low)) : 0;
  }

  function sliderValue(id) {
    const at = Number(byId(id).value);
    if (id === "rerank") return info.rerank.dims[at];
    const [low, high] = scales[id]();
    return at >= 100 ? high : Math.min(high, Math.max(low, round(low * (high / low) ** (at / 100))));
  }

  function showValue(id) {
    const [value, unit] = { shortlist: [choice.shortlist, "rows"], nprobe: [choice.nprobe, "lists"], rerank: [choice.rerank, "dims"] }[id];
    byId(`${id}-value`).replaceChildren(count(value), make("small", "", ` ${unit}`));
    byId(id).setAttribute("aria-valuetext", `${count(value)} ${unit}`);
  }

  function reset() {
    choice = { shortlist: info.shortlist.default, nprobe: info.nprobe.default, rerank: info.rerank.default };
    for (const id of Object.keys(choice)) {
      byId(id).value = sliderPosition(id);
      showValue(id);
    }
  }

  let waiting = 0;
  for (const id of ["shortlist", "nprobe", "rerank"]) {
    byId(id).addEventListener("input", () => {
      if (!info) return;
      choice[id] = sliderValue(id);
      showValue(id);
      clearTimeout(waiting);
      waiting = setTimeout(adapt, 80);  // a drag sends an event for every pixel
    });
  }
  byId("reset").addEventListener("click", () => { if (info) { reset(); adapt(); } });

  // ------------------------------------------------------------ searches

  const adapt = latest(async (signal) => {
    if (!asked) return;
    const found = await ask(`/api/adaptive?${parameters()}`, { signal });
    if (found.version !== info.version) return search();
    adaptive(found);
  });

  const search = latest(async (signal) => {
    const columns = byId("columns");
    clearTimeout(waiting);
    columns.setAttribute("aria-busy", "true");
    try {
      let found = await ask(`/api/neighbours?${parameters()}`, { signal });
      if (found.version !== info.version) {  // the index has changed, and the sliders with it
        await loadIndex(signal);
        found = await ask(`/api/neighbours?${parameters()}`, { signal });
      }
      show(found);
    } finally {
      if (!signal.aborted) columns.removeAttribute("aria-busy");
    }
  });

  const begin = latest(async (signal) => {
    await loadIndex(signal);
    const row = readAddress();
    if (row !== null) return go({ row }, false);
    if (info.rows) go(await ask("/api/random", { signal }), false);
  });

  const random = latest(async (signal) => go(await ask("/api/random", { signal })));

  const upload = latest(async (signal, file) => {
    if (!info) return;
    if (file.size > info.max_upload) {
      throw new Error(`The picture has ${(file.size / 2 ** 20).toFixed(1)} MB, more than ${info.max_upload / 2 ** 20} MB.`);
    }
    byId("columns").setAttribute("aria-busy", "true");
    try {
      const { query } = await ask("/api/query", { method: "POST", body: file, signal });
      go({ query, name: file.name, picture: URL.createObjectURL(file) });  // not revoked: the history may return to it
    } catch (error) {
      byId("columns").removeAttribute("aria-busy");
      throw error;
    }
  });

  function go(next, remember = true) {
    asked = next;
    history[remember ? "pushState" : "replaceState"](next, "", pageAddress(next));
    return search();
  }

  addEventListener("popstate", (event) => {
    if (!info) return;
    const row = readAddress();
    asked = event.state || (row === null ? asked : { row });
    if (asked) search();
  });

  // ------------------------------------------------------------ the page

  const labelOf = (hit) => hit.class || hit.name;

  // The query's tile: its picture, else its name.
  function showName(name) {
    const cut = name.length > 90 ? `…${name.slice(-90)}` : name;  // the end of a path identifies it
    byId("empty").replaceChildren(...breakable(cut));
    byId("empty").hidden = !byId("picture").hidden;
    byId("drop").classList.add("full");
  }

  function show(found) {
    const uploaded = asked.row === undefined;
    const what = uploaded ? { class: asked.name || "your image", name: "" } : found.query;
    const picture = byId("picture"), caption = byId("asked");
    picture.alt = `query: ${labelOf(what)}`;
    picture.hidden = byId("enlarge").hidden = !uploaded && !info.pictures;
    if (!picture.hidden) picture.src = uploaded ? asked.picture : address(asked.row, 480, found.version);
    const title = make("b"), more = make("small"), row = uploaded ? "" : `row ${count(asked.row)}`;
    picture.dataset.name = uploaded ? what.class : what.name;
    showName(picture.dataset.name);
    const name = picture.hidden ? "" : what.name;  // else the tile shows it
    title.append(...breakable(what.class || name || row));
    if (what.class) more.append(...breakable([row, name === String(asked.row) ? "" : name].filter(Boolean).join(", ")));
    else if (name) more.append(row);
    caption.replaceChildren(title, more);

    const expected = found.expected_class;
    byId("kin-legend").hidden = expected === null;
    byId("kin-of").textContent = `of the ${uploaded ? "predicted class" : "query's class"}${expected === null ? "" : `, ${expected}`}`;
    for (const kind of ["csv", "json"]) byId(kind).href = `/api/neighbours.${kind}?${parameters()}`;
    shown = { ...found, name: labelOf(what), more: [row, name].filter(Boolean).join(", "), picture: uploaded ? asked.picture : address(asked.row, 1024, found.version) };
    predict();
    map.show(found, view.classes);
    const columns = found.columns.map((column) => {
      const node = makeColumn(`${column.dim}`, "dims", column, found.version);
      node.dataset.dim = column.dim;
      return node;
    });
    byId("columns").replaceChildren(...(info.exact_only ? [] : [make("section", "column adaptive")]), ...columns);
    if (!info.exact_only) adaptive(found);
    else byId("said").textContent = `${count(found.columns.at(-1).hits.length)} neighbours at each of ${found.columns.length} prefixes.`;
  }

  // The most probable classes by the model. That of a row needs its picture.
  async function predict() {
    const node = byId("predicted"), now = asked;
    if (!info.predicts || (asked.row !== undefined && !info.pictures)) {
      node.hidden = true;
      return;
    }
    const { classes } = await ask(`/api/prediction?${new URLSearchParams(query())}`).catch(() => ({ classes: [] }));
    if (now !== asked) return;  // another query has been asked meanwhile
    node.hidden = !classes.length;
    node.replaceChildren("Model: ", ...classes.flatMap((one, i) => [
      i ? ", " : "", make(i ? "span" : "b", "", `${one.class} ${percent(one.probability)}`)]));
  }

  const percent = (share) => (share < 0.01 ? "<\u202f1\u202f%" : `${Math.round(100 * share)}\u202f%`);

  function adaptive({ adaptive: fast, version }) {
    const node = makeColumn("Adaptive", "", fast, version);
    node.classList.add("adaptive");
    const before = document.querySelector(".column.adaptive");
    if (before) before.replaceWith(node);
    byId("recall").textContent = `${fast.agree} of ${fast.of}`;
    byId("time").textContent = time(fast.ms);
    byId("exact").textContent = time(fast.exact_ms);
    const slow = Number(fast.ratio.toFixed(1)) < 1;
    byId("ratio").textContent = slow ? "slower" : `${fast.ratio >= 10 ? count(Math.round(fast.ratio)) : fast.ratio.toFixed(1)}×`;
    byId("ratio-of").replaceChildren(slow ? "than exact" : "the speed", make("span", "wide", slow ? " search" : " of exact search"));
    byId("slow").hidden = !slow;
    byId("slow").textContent = info.nprobe.high ? "With these settings, exact search of all rows is as fast."
      : "An index this small is searched exactly in the same time.";
    byId("setting").textContent = fast.setting;
    byId("said").textContent = `Adaptive search found ${fast.agree} of ${fast.of} in ${time(fast.ms)}.`;
  }

  function makeColumn(title, unit, column, version) {
    const node = make("section", "column"), head = make("h3"), name = make("span", "", title);
    if (unit) name.append(make("small", "", ` ${unit}`));
    head.append(name);
    const share = make("p", "share"), bar = make("span", "meter");
    bar.style.setProperty("--part", column.of ? column.agree / column.of : 0);
    share.append(bar, make("span", "agree", `${column.agree} of ${column.of}`));
    const list = make("ol");
    const views = largeViews(column, unit ? `${title} dimensions` : "adaptive search", version);
    list.append(...column.hits.map((hit, i) => makeHit(hit, version, () => enlarge(views, i))));
    node.append(head, share);
    if (column.same_class !== null) node.append(make("p", "kin-share", `${column.same_class} of ${column.hits.length} same class`));
    node.append(list);
    if (!column.hits.length) node.append(make("p", "none", "nothing found"));
    // ReLU features: a short prefix of an image may be all zeros, which have no direction.
    else if (column.hits.every((hit) => hit.cosine === 0)) {
      list.before(make("p", "none", "all 0 in the query: no order"));
    }
    return node;
  }

  function makeHit(hit, version, open) {
    const item = make("li", `hit${hit.agrees ? " agrees" : ""}${hit.same_class ? " kin" : ""}${info.pictures ? "" : " bare"}`);
    item.dataset.row = hit.row;
    item.title = hit.class ? `${hit.class}\n${hit.name}` : hit.name;
    const name = make("span", hit.class ? "name" : "name alone");
    const text = make("bdi", "", hit.class ? hit.name.split("/").pop() : hit.name);  // the folder usually is the class
    text.dir = "ltr";  // .name is right-to-left, so that its front is cut
    name.append(text);
    const tick = hit.agrees ? make("span", "tick", "✓") : null;
    if (tick) tick.setAttribute("aria-hidden", "true");
    const pick = make("button", "pick");  // it covers the whole item, except for the picture
    pick.type = "button";
    if (info.pictures) {
      const frame = make("button", "frame"), image = make("img");
      frame.type = "button";
      frame.setAttribute("aria-label", `Enlarge ${labelOf(hit)}`);
      image.alt = "";  // the text beside it has the name
      image.addEventListener("error", () => image.replaceWith("no picture"));
      image.src = address(hit.row, 128, version);
      frame.append(image);
      if (tick) frame.append(tick);
      frame.addEventListener("click", open);
      item.append(frame);
    } else if (tick) pick.append(tick);
    if (hit.class) pick.append(make("span", "what", hit.class));
    pick.append(make("span", "cosine", hit.cosine.toFixed(3)));
    if (hit.agrees) pick.append(make("span", "hidden", `, ${byId("legend").textContent}`));
    if (hit.same_class) pick.append(make("span", "hidden", `, ${byId("kin-of").textContent}`));
    item.append(pick, name);
    pick.addEventListener("click", () => pickRow(hit.row));
    const mark = (on) => {
      for (const same of document.querySelectorAll(`.hit[data-row="${hit.row}"]`)) same.classList.toggle("same", on);
    };
    for (const event of ["pointerenter", "focusin"]) item.addEventListener(event, () => mark(true));
    for (const event of ["pointerleave", "focusout"]) item.addEventListener(event, () => mark(false));
    return item;
  }

  function pickRow(row) {
    go({ row });
    scrollTo({ top: 0 });
    byId("scroll").focus({ preventScroll: true });  // the new page has other buttons
  }

  // ------------------------------------------------------------ the map and the large view

  const map = makeMap(ask, pickRow);

  const enlarge = makeViewer(pickRow);
  const largeViews = ({ hits }, by, version) => hits.map((hit, i) => ({
    source: address(hit.row, 1024, version), name: labelOf(hit), row: hit.row,
    more: `${hit.class ? `${hit.name}, ` : ""}neighbour ${i + 1} of ${hits.length} by ${by}, cosine ${hit.cosine.toFixed(3)}`,
  }));
  byId("enlarge").addEventListener("click", () => {
    const widest = shown.columns.at(-1);
    const own = { source: shown.picture, name: shown.name, more: ["the query", shown.more].filter(Boolean).join(", "), row: null };
    enlarge([own, ...(info.pictures ? largeViews(widest, `${widest.dim} dimensions`, shown.version) : [])], 0);
  });

  // ------------------------------------------------------------ uploads

  byId("random").addEventListener("click", random);
  byId("file").addEventListener("change", (event) => {
    if (event.target.files[0]) upload(event.target.files[0]);
    event.target.value = "";  // the same file may be chosen again
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files || [])].find((f) => f.type.startsWith("image/"));
    if (file) upload(file);
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });

  byId("picture").addEventListener("error", () => {
    byId("picture").hidden = byId("enlarge").hidden = true;
    showName(byId("picture").dataset.name);
  });

  // ------------------------------------------------------------ narrow screens

  const narrow = matchMedia("(max-width: 38rem)");
  const fold = () => { byId("tuning").open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();

  // Fade the side that has more columns.
  const scroll = byId("scroll");
  const fade = () => {
    scroll.classList.toggle("before", scroll.scrollLeft > 1);
    scroll.classList.toggle("after", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 1);
  };
  scroll.addEventListener("scroll", fade, { passive: true });
  new ResizeObserver(fade).observe(scroll);
  new ResizeObserver(fade).observe(byId("columns"));
  begin();
})();
