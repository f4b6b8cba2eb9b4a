"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => byId(id) && JSON.parse(byId(id).textContent);
  const make = (name, attributes = {}, text = null, space = null) => {
    const node = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    return node;
  };
  const SVG = "http://www.w3.org/2000/svg";

  // Theme: the system's preference until the button is used.
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Printed pages show every folded section.
  let folded = [];
  addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details:not([open])")) { folded.push(d); d.open = true; }
  });
  addEventListener("afterprint", () => { for (const d of folded) d.open = false; folded = []; });

  // Confusion of superclasses or classes: one square per pair, shaded by its share of the true one.
  const matrix = (id, what) => {
    const confusion = read(`${id}-data`);
    if (!confusion) return;
    const shorter = (name) => (name.length > 30 ? `${name.slice(0, 29)}…` : name);
    const ruler = make("canvas").getContext("2d");
    ruler.font = `13px ${getComputedStyle(document.body).fontFamily}`;
    const widthOf = (name) => ruler.measureText(shorter(name)).width;
    const draw = () => {
      const dim = byId(`${id}-dim`).value;
      const counts = confusion.confusion[dim];
      const kept = confusion.names.map((_, k) => k).filter((k) => counts[k].some((n) => n) || counts.some((row) => row[k]));
      const side = kept.length > 16 ? 19 : innerWidth < 600 ? 20 : 34, longest = Math.max(...kept.map((k) => widthOf(confusion.names[k]))),
        left = 14 + longest, top = 16 + 0.87 * longest, right = 20 + 0.5 * longest, size = side * kept.length;
      const svg = make("svg", { class: "chart", viewBox: `0 0 ${left + size + right} ${top + size + 6}`, role: "img",
        style: `width:${left + size + right}px;max-width:none`, "aria-label": `confusion by ${what} with ${dim} dimensions` }, null, SVG);
      let hits = 0, all = 0;
      kept.forEach((k, i) => {
        const total = counts[k].reduce((a, b) => a + b, 0);
        hits += counts[k][k]; all += total;
        svg.append(make("text", { class: "tick", x: left - 6, y: top + (i + 0.5) * side + 4, "text-anchor": "end" }, shorter(confusion.names[k]), SVG));
        const turned = make("text", { class: "label", transform: `translate(${left + (i + 0.5) * side + 4} ${top - 6}) rotate(-60)` }, shorter(confusion.names[k]), SVG);
        svg.append(turned);
        kept.forEach((j, at) => {
          const share = total ? counts[k][j] / total : 0;
          const cell = make("rect", { class: "cell", x: left + at * side + 0.5, y: top + i * side + 0.5, width: side - 1, height: side - 1,
            "fill-opacity": (share ? 0.06 + 0.94 * share : 0.03).toFixed(3) }, null, SVG);
          cell.append(make("title", {}, `${confusion.names[k]} predicted as ${confusion.names[j]}: ${counts[k][j]} of ${total} (${(100 * share).toFixed(1)} %)`, SVG));
          svg.append(cell);
        });
      });
      byId(id).replaceChildren(svg);
      byId(`${id}-said`).textContent = `rows: true ${what}; columns: predicted ${what}; ${(100 * hits / all).toFixed(2)} % on the diagonal`;
    };
    byId(`${id}-dim`).addEventListener("change", draw);
    draw();
  };
  matrix("confusion", "group");
  matrix("class-confusion", "class");

  // Table of classes: sortable by any column, searchable, paginated.
  const classes = read("class-data");
  if (classes) {
    const PAGE = 25, PRINTED = 2000;  // rows per page on screen; maximum in print
    let size = PAGE;
    const columns = ["Class", "Images", "Trend", "", ...classes.dims.map(String)];
    const value = (row, c) => (c === 0 ? row[0].toLowerCase() : c === 1 ? row[2] : c === 2 ? row[3] : row[c]);
    const last = columns.length - 1;
    let sorted = { column: last, down: false }, page = 0;

    // Columns that a phone has no room for.
    const inner = (c) => c === 1 || (c > 4 && c < last);
    const head = byId("class-table").tHead.rows[0];
    columns.forEach((name, c) => {
      const th = make("th", { scope: "col", class: inner(c) ? "inner" : "" });
      if (c === 3) {
        th.append(make("span", { class: "hidden" }, "Curve"));
      } else {
        const button = make("button", { type: "button" }, name);
        button.addEventListener("click", () => {
          sorted = { column: c, down: sorted.column === c ? !sorted.down : c > 3 };
          page = 0;
          fill();
        });
        th.append(button);
      }
      head.append(th);
    });

    const spark = (row) => {
      const values = row.slice(4);
      const svg = make("svg", { class: "spark", viewBox: "0 0 70 20", "aria-hidden": "true" }, null, SVG);
      const points = values.map((v, i) => (v === null ? null : `${3 + (64 * i) / Math.max(values.length - 1, 1)},${(18 - 0.16 * v).toFixed(1)}`));
      svg.append(make("polyline", { points: points.filter((p) => p !== null).join(" ") }, null, SVG));
      return svg;
    };

    const fill = () => {
      const wanted = byId("search").value.trim().toLowerCase();
      const rows = classes.rows.filter((row) => [row[0], row[1], row[3]].some((text) => text.toLowerCase().includes(wanted)));
      const sign = sorted.down ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [value(a, sorted.column), value(b, sorted.column)];
        if (x === null || y === null) return (x === null) - (y === null);
        return x < y ? -sign : x > y ? sign : a[0] < b[0] ? -1 : 1;
      });
      const pages = Math.max(1, Math.ceil(rows.length / size));
      page = Math.min(page, pages - 1);
      [...head.cells].forEach((th, c) => {
        if (c === sorted.column) th.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
        else th.removeAttribute("aria-sort");
        const button = th.querySelector("button");
        if (button) button.textContent = columns[c] + (c === sorted.column ? (sorted.down ? " ▼" : " ▲") : "");
      });
      const body = byId("class-table").tBodies[0];
      body.replaceChildren(...rows.slice(page * size, (page + 1) * size).map((row) => {
        const tr = make("tr");
        const name = make("th", { scope: "row" }, row[0]);
        if (row[1] !== row[0]) name.append(make("small", {}, row[1]));
        const curve = make("td");
        curve.append(spark(row));
        tr.append(name, make("td", { class: "inner" }, row[2].toLocaleString("en")), make("td", { class: "text" }, row[3]), curve);
        row.slice(4).forEach((v, g) => {
          const space = inner(g + 4) ? " inner" : "";
          const td = v === null ? make("td", { class: space }, "–") : make("td", { class: `shaded${space}`, style: `--strength:${(v / 100).toFixed(2)}` }, v === 100 ? "100" : v.toFixed(1));
          tr.append(td);
        });
        return tr;
      }));
      byId("found").textContent = `${rows.length.toLocaleString("en")} of ${classes.rows.length.toLocaleString("en")} classes`;
      byId("page").textContent = `page ${page + 1} of ${pages}`;
      byId("previous").disabled = page === 0;
      byId("next").disabled = page >= pages - 1;
    };
    let before = 0;
    addEventListener("beforeprint", () => { if (size === PAGE) { before = page; size = PRINTED; page = 0; fill(); } });
    addEventListener("afterprint", () => { size = PAGE; page = before; fill(); });
    byId("search").addEventListener("input", () => { page = 0; fill(); });
    byId("previous").addEventListener("click", () => { page -= 1; fill(); });
    byId("next").addEventListener("click", () => { page += 1; fill(); });
    fill();
  }
})();
