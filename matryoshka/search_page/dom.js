// Nodes of the page. Names come from files: they are text, never HTML.
export const byId = (id) => document.getElementById(id);

export const make = (name, className = "", text = null) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== null) node.textContent = text;
  return node;
};

// Lines break after a separator or before the extension, not inside of words.
export const breakable = (name) => name.split(/(?<=[/_-])|(?<=[^/_-]{12})(?=\.[^./]{1,5}$)/).flatMap((part) => [make("wbr"), part]);

export const count = (n) => n.toLocaleString("en");

export const address = (row, size, version) => `/image/${row}?size=${size}&version=${version}`;
