// A large view of the query or of a neighbour; arrow keys move through the list that it is from.
import { breakable, byId } from "./dom.js";

const MOST_ENLARGED = 6;  // a thumbnail-sized original on a whole screen shows nothing but blur

// search(row) makes an image the query. Returns open(items, at), items: [{source, name, more, row}];
// row: null for the query itself.
export function makeViewer(search) {
  const dialog = byId("viewer"), image = byId("viewer-image");
  let items = [], at = 0;

  function show(next) {
    at = Math.max(0, Math.min(items.length - 1, next));
    const item = items[at];
    byId("viewer-none").hidden = true;
    image.hidden = false;
    image.removeAttribute("src");  // not the one before while the next is loaded
    image.alt = item.name;
    image.src = item.source;
    byId("viewer-name").replaceChildren(...breakable(item.name));
    byId("viewer-more").replaceChildren(...breakable(item.more));
    byId("viewer-ask").hidden = item.row === null;
    byId("viewer-back").disabled = at === 0;
    byId("viewer-next").disabled = at === items.length - 1;
    // A disabled or hidden button would take the focus, and with it the keys, out of the dialog.
    if (!dialog.contains(document.activeElement) || document.activeElement.disabled) byId("viewer-close").focus();
  }

  image.addEventListener("load", () => {
    image.style.maxWidth = `min(100%, ${MOST_ENLARGED * image.naturalWidth}px)`;
    image.style.maxHeight = `min(100%, ${MOST_ENLARGED * image.naturalHeight}px)`;
  });
  image.addEventListener("error", () => {
    image.hidden = true;
    byId("viewer-none").hidden = false;
  });
  byId("viewer-back").addEventListener("click", () => show(at - 1));
  byId("viewer-next").addEventListener("click", () => show(at + 1));
  byId("viewer-close").addEventListener("click", () => dialog.close());
  byId("viewer-ask").addEventListener("click", () => {
    dialog.close();
    search(items[at].row);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });  // beside it
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (step === undefined && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    show(event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : at + step);
  });

  return (list, first) => {
    items = list;
    dialog.showModal();
    show(first);
    (byId("viewer-ask").hidden ? byId("viewer-close") : byId("viewer-ask")).focus();
  };
}
