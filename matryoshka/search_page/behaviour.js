"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (name, className = "", text = null) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== null) node.textContent = text;  // never HTML: names come from files
    return node;
  };
  const count = (n) => n.toLocaleString("en");
  // Untrusted names: lines break after a separator or before the extension, not inside of words.
  const breakable = (name) => name.split(/(?<=[/_-])|(?<=[^/_-]{12})(?=\.[^./]{1,5}$)/).flatMap((part) => [make("wbr"), part]);
  const time = (ms) => `${Number(ms.toPrecision(2)).toLocaleString("en", { maximumFractionDigits: 6 })} ms`;
  let info = null;    // the answer of /api/index
  let asked = null;   // the present query: {row} or {query, picture}
  let choice = {};   // values of the sliders

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

  const parameters = (more = {}) => {
    const query = asked.row === undefined ? { query: asked.query } : { row: asked.row };
    return new URLSearchParams({ ...query, ...choice, ...more });
  };

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
    byId("recall-of").textContent = `recall@${info.neighbours}`;
    byId("exact-of").textContent = ` search, ${info.columns} dimensions`;
    byId("legend").textContent = `also among the ${info.neighbours} nearest by all ${info.columns} dimensions`;
    byId("shortlist-of").textContent = `by ${info.shortlist.dim} dimensions`;
    byId("nprobe-of").textContent = `of ${count(info.nprobe.high)}`;
    byId("nprobe-row").hidden = !info.nprobe.high;
    byId("rerank-row").hidden = info.rerank.dims.length < 2;
    byId("rerank").max = info.rerank.dims.length - 1;
    reset();
  }

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
    const row = /^#row=(\d+)$/.exec(location.hash);
    if (row) return go({ row: Number(row[1]) }, false);
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
    const hash = next.row === undefined ? location.pathname : `#row=${next.row}`;
    history[remember ? "pushState" : "replaceState"](next, "", hash);
    return search();
  }

  addEventListener("popstate", (event) => {
    const row = /^#row=(\d+)$/.exec(location.hash);
    asked = event.state || (row ? { row: Number(row[1]) } : asked);
    if (asked && info) search();
  });

  // ------------------------------------------------------------ the page

  const address = (row, size, version) => `/image/${row}?size=${size}&version=${version}`;
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
    picture.hidden = !uploaded && !info.pictures;
    if (!picture.hidden) picture.src = uploaded ? asked.picture : address(asked.row, 480, found.version);
    const title = make("b"), more = make("small"), row = uploaded ? "" : `row ${count(asked.row)}`;
    picture.dataset.name = uploaded ? what.class : what.name;
    showName(picture.dataset.name);
    const name = picture.hidden ? "" : what.name;  // else the tile shows it
    title.append(...breakable(what.class || name || row));
    if (what.class) more.append(...breakable([row, name === String(asked.row) ? "" : name].filter(Boolean).join(", ")));
    else if (name) more.append(row);
    caption.replaceChildren(title, more);

    const columns = found.columns.map((column) => {
      const node = makeColumn(`${column.dim}`, "dims", column, found.version);
      node.dataset.dim = column.dim;
      return node;
    });
    byId("columns").replaceChildren(make("section", "column adaptive"), ...columns);
    adaptive(found);
  }

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
    list.append(...column.hits.map((hit) => {
      const item = make("li");
      item.append(makeHit(hit, version));
      return item;
    }));
    node.append(head, share, list);
    if (!column.hits.length) node.append(make("p", "none", "nothing found"));
    return node;
  }

  function makeHit(hit, version) {
    const button = make("button", `hit${hit.agrees ? " agrees" : ""}${info.pictures ? "" : " bare"}`);
    button.type = "button";
    button.dataset.row = hit.row;
    button.title = hit.class ? `${hit.class}\n${hit.name}` : hit.name;
    const text = make("span"), name = make("span", hit.class ? "name" : "name alone");
    const shown = make("bdi", "", hit.class ? hit.name.split("/").pop() : hit.name);  // the folder usually is the class
    shown.dir = "ltr";  // .name is right-to-left, so that its front is cut
    name.append(shown);
    const tick = hit.agrees ? make("span", "tick", "✓") : null;
    if (tick) tick.setAttribute("aria-hidden", "true");
    if (info.pictures) {
      const frame = make("span", "frame"), image = make("img");
      image.alt = "";  // the text beside it has the name
      image.addEventListener("error", () => image.replaceWith("no picture"));
      image.src = address(hit.row, 128, version);
      frame.append(image);
      if (tick) frame.append(tick);
      button.append(frame);
    } else if (tick) text.append(tick);
    if (hit.class) text.append(make("span", "what", hit.class));
    text.append(make("span", "cosine", hit.cosine.toFixed(3)));
    if (hit.agrees) text.append(make("span", "hidden", `, ${byId("legend").textContent}`));
    button.append(text, name);
    button.addEventListener("click", () => {
      go({ row: hit.row });
      scrollTo({ top: 0 });
      byId("scroll").focus({ preventScroll: true });  // the new page has other buttons
    });
    const mark = (on) => {
      for (const same of document.querySelectorAll(`.hit[data-row="${hit.row}"]`)) same.classList.toggle("same", on);
    };
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => mark(true));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => mark(false));
    return button;
  }

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
    byId("picture").hidden = true;
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
