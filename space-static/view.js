// What the page shows. Names come from the gallery: they are set as text, never as markup.

import { FailedDownload } from "./download.js";
import { creditOf } from "./gallery.js";

export const find = (selector, within = document) => within.querySelector(selector);

const SVG = "http://www.w3.org/2000/svg";
const SYMBOLS = {
  close: "m6 6 12 12M18 6 6 18",
  copy: "M9 9h9a2 2 0 0 1 2 2v8a2 2 0 0 1-2 2h-7a2 2 0 0 1-2-2zM5 15a2 2 0 0 1-1-2V5a2 2 0 0 1 2-2h7a2 2 0 0 1 2 2",
  save: "M12 4v11m0 0-4-4m4 4 4-4M5 20h14",
  describe: "M20 12a7.5 7 0 0 1-7.5 7c-1.2 0-2.4-.3-3.4-.8L4.5 19.5l1.3-3.8A6.8 6.8 0 0 1 5 12a7.5 7 0 0 1 15 0zM9 12h.01M12.5 12h.01M16 12h.01",
  similar: "M11 4.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM16 16l4.5 4.5",
};

/** An element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "class") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function symbol(name) {
  const drawing = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SYMBOLS[name]);
  drawing.append(path);
  return drawing;
}

function link(url, text) {
  if (!/^https?:\/\//.test(url)) return text;
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, text);
}

// ------------------------------------------------------------------------------------------------------ loading

export function showProgress(share, words) {
  const box = find("#loading");
  box.hidden = share === null;
  if (share === null) return;
  find("progress", box).value = share;
  find("p", box).textContent = words;
}

/** The panel for what a visitor must know; `again` is what its button does, null for none. */
export function showProblem(title, words, again) {
  const panel = find("#problem");
  const button = find("button", panel);
  find("h2", panel).textContent = title;
  find("p", panel).textContent = words;
  button.hidden = again === null;
  button.onclick = again;
  panel.hidden = false;
  showProgress(null);
}

export function hideProblem() {
  find("#problem").hidden = true;
}

export function showCredits(sets) {
  const parts = sets.flatMap((set, number) => [
    number ? " and " : "Icons: ",
    link(set.url, set.title),
    ` by ${set.author} (`,
    link(set.license_url, set.license),
    ")",
  ]);
  find("#credits").replaceChildren(...parts, ".");
}

// --------------------------------------------------------------------------------------------------------- hits

/** Cards of hits at the end of the list; `open` is called with a hit. */
export function appendHits(gallery, hits, open) {
  const list = find("#hits");
  const cards = hits.map((hit) => {
    const { name } = gallery.icon(hit.index);
    const picture = element("img", { src: gallery.url(hit.index), alt: "", width: 64, height: 64, loading: "lazy" });
    const card = element(
      "button",
      { type: "button", class: "hit", tabIndex: -1, onclick: () => open(hit) },
      element("span", { class: "tile" }, picture),
      element("span", { class: "name" }, name),
    );
    return element("li", {}, card);
  });
  list.append(...cards);
  const first = find("button", list);
  if (first && !find("button[tabindex='0']", list)) first.tabIndex = 0;
}

export function clearHits() {
  find("#hits").replaceChildren();
}

/** Puts the focus on a card, by its place in the list; the tab key comes back to it. */
export function focusHit(place) {
  const list = find("#hits");
  const card = list.querySelectorAll("button")[place];
  if (!card) return;
  find("button[tabindex='0']", list).tabIndex = -1;
  card.tabIndex = 0;
  card.focus();
}

/** The list is one stop of the tab key; arrows, Home and End go from icon to icon. */
export function walkHits(event) {
  const cards = [...find("#hits").querySelectorAll("button")];
  const at = cards.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  const ends = { Home: 0, End: cards.length - 1 };
  const next = event.key in ends ? ends[event.key] : at + steps[event.key];
  if (!cards[next]) return;
  event.preventDefault();
  focusHit(next);
}

// ------------------------------------------------------------------------------------------------------- detail

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No permission, or a page without https.
    const field = element("textarea", { class: "hidden", value: text });
    (find("dialog[open]") ?? document.body).append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

/** Makes a button copy a text. */
function letCopy(button, label, text) {
  const words = element("span", { "aria-live": "polite" }, label);
  button.replaceChildren(symbol("copy"), words);
  button.onclick = async () => {
    await copy(text);
    words.textContent = "Copied";
    setTimeout(() => (words.textContent = label), 1500);
  };
  return button;
}

function copyButton(label, text) {
  return letCopy(element("button", { type: "button" }), label, text);
}

/**
 * A button that has a picture described, and what came of it.
 *
 * @param describe does it, and tells `report` of the download.
 * @param missingBytes promises how many bytes that will be.
 */
export function describeBox(describe, missingBytes) {
  const label = element("span", {}, "Describe this picture");
  const size = element("small");
  const button = element("button", { type: "button" }, symbol("describe"), label, size);
  const bar = element("progress", { max: 1, value: 0, hidden: true, "aria-label": "Loading what writes descriptions" });
  const words = element("p", { "aria-live": "polite", "aria-atomic": "true" });
  const say = (text, kind = "") => Object.assign(words, { textContent: text, className: kind });
  const looking = () => say("Looking at it …");
  const megabytes = (bytes) => Math.max(1, Math.round(bytes / 1e6));
  const report = (done, all) => {
    bar.hidden = done >= all;
    bar.value = done / all;
    size.textContent = bar.hidden ? "" : `${megabytes(done)} of ${megabytes(all)} MB`;
    if (bar.hidden) looking();
  };
  missingBytes().then((bytes) => (size.textContent = bytes ? `${megabytes(bytes)} MB, once` : ""));
  button.onclick = async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true"); // it keeps the focus
    try {
      if (await missingBytes()) say("Loading what writes descriptions …");
      else looking();
      const { text } = await describe(report);
      say(text ? `The model sees “${text}”` : "The model finds no words for it.", "said");
      if (text) letCopy(button, "Copy description", text);
      else button.remove();
    } catch (error) {
      say(`No description: ${error.message}.${error instanceof FailedDownload ? " Is there a network?" : ""}`, "failed");
      label.textContent = "Try again";
      size.textContent = "";
    }
    bar.hidden = true;
    button.removeAttribute("aria-disabled");
  };
  return element("div", { class: "describe" }, words, bar, button);
}

/** Everything about an icon; `similar` is called to find icons like it, `description` is a `describeBox` or null. */
export function showDetail(gallery, { index, cosine }, similar, description) {
  const icon = gallery.icon(index);
  const { set } = icon;
  const dialog = find("#detail");
  const close = element("button", { type: "button", class: "close", title: "Close", onclick: () => dialog.close() });
  close.append(symbol("close"), element("span", { class: "hidden" }, "Close"));
  const facts = [
    ["Set", link(set.url, set.title)],
    ["Drawn by", set.author],
    ["Licence", link(set.license_url, set.license)],
    ["Style", icon.style],
    ["Similarity", cosine === undefined ? null : cosine.toFixed(2)],
  ].filter(([, value]) => value !== null);
  const download = `${icon.id.replace(/[^\p{L}\p{N}]+/gu, "-")}.png`;
  dialog.replaceChildren(
    close,
    element("span", { class: "tile" }, element("img", { src: gallery.url(index), alt: "", width: 128, height: 128 })),
    element("h2", { id: "detail-name" }, icon.name),
    icon.otherNames.length ? element("p", {}, `also: ${icon.otherNames.join(", ")}`) : "",
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    description ?? "",
    element(
      "div",
      { class: "actions" },
      copyButton("Copy name", icon.name),
      copyButton("Copy credit", creditOf(icon)),
      element("a", { class: "button", href: gallery.url(index), download }, symbol("save"), "Save PNG"),
      element(
        "button",
        {
          type: "button",
          class: "main",
          onclick: () => {
            dialog.close();
            similar(index);
          },
        },
        symbol("similar"),
        "Find similar",
      ),
    ),
  );
  dialog.showModal();
}
