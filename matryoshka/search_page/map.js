// The map: a point for each image, coloured by class; the query and its neighbours stand out.
import { address, byId, count, make } from "./dom.js";

const LARGEST = 8;   // classes with a colour; the others are grey
const NEAR = 10;     // pixels from the pointer to a point
const MARGIN = 18;   // pixels

// Shapes besides colours, for those who cannot tell the colours apart.
const SHAPES = [
  (c, x, y, r) => c.arc(x, y, r, 0, 7),
  (c, x, y, r) => c.rect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r),
  (c, x, y, r) => { c.moveTo(x, y - 1.2 * r); c.lineTo(x + 1.1 * r, y + 0.8 * r); c.lineTo(x - 1.1 * r, y + 0.8 * r); c.closePath(); },
  (c, x, y, r) => { c.moveTo(x, y - 1.3 * r); c.lineTo(x + 1.3 * r, y); c.lineTo(x, y + 1.3 * r); c.lineTo(x - 1.3 * r, y); c.closePath(); },
];

// ask(address) -> JSON; search(row) makes an image the query.
export function makeMap(ask, search) {
  const canvas = byId("canvas"), frame = byId("map-frame"), tip = byId("tip"), select = byId("map-dim");
  let info = null;       // the answer of /api/index
  let data = null;       // the answer of /api/map
  let rank = [];         // number of a class -> 0 .. LARGEST - 1 by falling size, -1: grey
  let found = null;      // the answer of /api/neighbours
  let classes = [];      // the filter
  let at = [];           // pixels of each point
  let hovered = -1;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  async function load() {
    const dim = Number(select.value), version = info.version;
    const answer = await ask(`/api/map?dim=${dim}`).catch(() => null);
    if (!answer || version !== info.version || dim !== Number(select.value)) return;
    data = answer;
    hovered = -1;
    const sizes = new Map();
    for (const one of data.class) if (one >= 0) sizes.set(one, (sizes.get(one) ?? 0) + 1);
    const largest = [...sizes].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, LARGEST).map(([one]) => one);
    rank = data.classes.map((_, one) => largest.indexOf(one));
    const method = data.method === "pca" ? "PCA" : "t-SNE";
    const part = data.rows.length < info.rows ? ` of ${count(data.rows.length)} of the ${count(info.rows)} images` : "";
    byId("map-of").textContent = `${method}${part}. Click a point to search with it.`;
    canvas.setAttribute("aria-label", `${method} map of ${count(data.rows.length)} images by their first ${dim} dimensions`);
    const entries = largest.map((one, i) => [i, data.classes[one]]);
    if (sizes.size > LARGEST || (data.class.includes(-1) && sizes.size)) entries.push([-1, "others"]);
    byId("map-legend").replaceChildren(...entries.map(([i, name]) => {
      const item = make("li"), sample = make("canvas"), text = make("span", "", name);
      sample.width = sample.height = 24;
      sample.dataset.rank = i;
      item.title = name;
      item.append(sample, text);
      return item;
    }));
    draw();
  }

  // The same scale on both axes: distances on the map can be compared.
  function scale(width, height) {
    let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const [x, y] of data.points) {
      left = Math.min(left, x); right = Math.max(right, x);
      top = Math.min(top, y); bottom = Math.max(bottom, y);
    }
    const unit = Math.min((width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (bottom - top || 1));
    const [x0, y0] = [width / 2 - unit * (left + right) / 2, height / 2 + unit * (top + bottom) / 2];
    return ([x, y]) => [x0 + unit * x, y0 - unit * y];
  }

  function point(context, [x, y], i, radius) {
    context.beginPath();
    SHAPES[i < 0 ? 0 : i % SHAPES.length](context, x, y, radius);
    context.fillStyle = css(i < 0 ? "--grey" : `--class-${i}`);
    context.fill();
  }

  function draw() {
    if (!data || byId("map").hidden || !frame.clientWidth) return;
    const width = frame.clientWidth, height = frame.clientHeight, dense = devicePixelRatio || 1;
    canvas.width = width * dense;
    canvas.height = height * dense;
    const context = canvas.getContext("2d");
    context.scale(dense, dense);
    const place = scale(width, height), radius = data.rows.length > 2000 ? 2 : 3;
    at = data.points.map(place);
    // Grey points first, so that they cover no others; each colour is read from the style once.
    const colours = [-1, ...Array(LARGEST).keys()];
    const wanted = data.classes.map((name) => !classes.length || classes.includes(name));
    for (const i of colours) {
      context.fillStyle = css(i < 0 ? "--grey" : `--class-${i}`);
      for (const faded of [true, false]) {
        context.beginPath();
        data.class.forEach((one, n) => {
          if ((one < 0 ? -1 : rank[one]) !== i || (classes.length > 0 && !wanted[one]) !== faded) return;
          const [x, y] = at[n];
          context.moveTo(x + radius, y);
          SHAPES[i < 0 ? 0 : i % SHAPES.length](context, x, y, radius);
        });
        context.globalAlpha = faded ? 0.12 : 0.75;
        context.fill();
      }
    }
    context.globalAlpha = 1;
    highlights(context, place);
    for (const sample of byId("map-legend").querySelectorAll("canvas")) {
      const small = sample.getContext("2d");
      small.clearRect(0, 0, 24, 24);
      point(small, [12, 12], Number(sample.dataset.rank), 8);
    }
  }

  function ring(context, [x, y], radius, colour, line) {
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    for (const [style, thick] of [[css("--paper"), line + 2.5], [colour, line]]) {
      context.strokeStyle = style;
      context.lineWidth = thick;
      context.stroke();
    }
  }

  function highlights(context, place) {
    const column = found?.columns.find((one) => one.dim === Number(select.value));
    for (const hit of column?.map?.hits ?? []) if (hit) ring(context, place(hit), 6, css("--ink"), 1.8);
    if (column?.map?.query) {
      ring(context, place(column.map.query), 10, css("--second"), 3);
      context.beginPath();
      context.arc(...place(column.map.query), 3, 0, 7);
      context.fillStyle = css("--second");
      context.fill();
    }
    if (hovered >= 0) ring(context, at[hovered], 7, css("--focus"), 2.5);
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = NEAR ** 2;
    at.forEach(([px, py], n) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [n, distance];
    });
    return best;
  }

  function hover(next) {
    if (next === hovered) return;
    hovered = next;
    canvas.style.cursor = next < 0 ? "default" : "pointer";
    tip.hidden = next < 0;
    if (next >= 0) {
      const one = data.class[next], [x, y] = at[next];
      byId("tip-text").replaceChildren(...(one < 0 ? [] : [make("b", "", data.classes[one])]), data.names[next]);
      byId("tip-image").hidden = !info.pictures;
      if (info.pictures) byId("tip-image").src = address(data.rows[next], 128, data.version);
      tip.style.left = `${Math.max(0, Math.min(x + 14, frame.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${y > frame.clientHeight / 2 ? y - tip.offsetHeight - 14 : y + 14}px`;
    }
    draw();
  }

  canvas.addEventListener("pointermove", (event) => { if (data) hover(nearest(event)); });
  canvas.addEventListener("pointerleave", () => hover(-1));
  canvas.addEventListener("click", (event) => {
    const n = data ? nearest(event) : -1;
    hover(-1);
    if (n >= 0) search(data.rows[n]);
  });
  byId("tip-image").addEventListener("error", () => { byId("tip-image").hidden = true; });
  select.addEventListener("change", load);
  new ResizeObserver(draw).observe(frame);
  // Another theme has other colours.
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  return {
    open(next) {
      const before = Number(select.value);
      info = next;
      data = null;
      byId("map").hidden = !info.map;
      if (!info.map) return;
      select.replaceChildren(...info.map.map((dim) => {
        const option = make("option", "", `${dim} dimensions`);
        option.value = dim;
        return option;
      }));
      select.value = info.map.includes(before) ? before : info.map.at(-1);
      load();
    },
    show(answer, only) {
      found = answer;
      classes = only;
      draw();
    },
  };
}
