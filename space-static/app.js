// The page: loads the files, listens to the visitor, searches.
//
//   words ───────────── engine.embedText ──┐
//   picture or SVG ──── engine.embedImage ─┼─ gallery.search ── hits
//   an icon of it ──────────────────────── ┘
//
//   picture, SVG, icon ── captions.describe ── words

import { Captions } from "./captions.js";
import { Downloads, FailedDownload, forget } from "./download.js";
import { Engine } from "./engine.js";
import { Gallery } from "./gallery.js";
import { pictureAmong, readPicture } from "./pictures.js";
import { toPixelValues } from "./pixels.js";
import { missingFeature } from "./support.js";
import { Refusal, shortened } from "./texts.js";
import {
  appendHits,
  clearHits,
  describeBox,
  element,
  find,
  focusHit,
  hideProblem,
  showCredits,
  showDetail,
  showProblem,
  showProgress,
  walkHits,
} from "./view.js";

const EXAMPLES = ["circus tent", "a happy face", "farm animal", "money", "letter in an envelope", "wheelchair"];
const PAGE = 60; // hits that are shown at a time
const TYPING_PAUSE = 200; // milliseconds after which what was typed is searched for
const WAIT_FOR_SERVICE_WORKER = 4000; // milliseconds; without it the page works, but not offline

export const engine = new Engine();
export let gallery = null;
export let captions = null; // of a model that writes none
let imageSettings = null;

/** What is ready, as promises, and how long it took. */
export const ready = { texts: deferred(), images: deferred() };
let asked = { kind: "nothing" }; // what is searched for
let turn = 0; // of whoever asks: a picture that is read late does not take the place of what was asked for meanwhile
let hits = [];
let shown = 0;

function deferred() {
  let settle;
  const promise = new Promise((...functions) => (settle = functions));
  promise.catch(() => {}); // whoever waits is told as well
  return Object.assign(promise, { resolve: settle[0], reject: settle[1] });
}

// ------------------------------------------------------------------------------------------------------ loading

/** Waits until the service worker sees the downloads, so that it keeps them for the next visit. */
async function keptForLater() {
  if (!navigator.serviceWorker) return false;
  const controlled = new Promise((resolve) => {
    if (navigator.serviceWorker.controller) resolve(true);
    navigator.serviceWorker.addEventListener("controllerchange", () => resolve(true));
  });
  const late = new Promise((resolve) => setTimeout(() => resolve(false), WAIT_FOR_SERVICE_WORKER));
  try {
    await navigator.serviceWorker.register("service-worker.js");
  } catch {
    return false; // private windows of some browsers
  }
  return Promise.race([controlled, late]);
}

async function load() {
  hideProblem();
  showProgress(0, "Loading …");
  const kept = await keptForLater();
  const response = await fetch("data/manifest.json").catch((error) => error);
  if (!response.ok) throw new FailedDownload("data/manifest.json could not be downloaded");
  const manifest = await response.json();
  imageSettings = manifest.images;
  if (manifest.captions) captions = new Captions(engine, ready.images, manifest);
  showAsked(asked); // what was asked for before
  const downloads = new Downloads(manifest.files, (done, all) => {
    const [have, need] = [done, all].map((bytes) => (bytes / 1e6).toFixed(0));
    showProgress(done / all, `Loading the search: ${have} of ${need} MB, kept for the next visit`);
  });
  downloads.expect("gallery", "pictures", "embeddings", "runtime", "text_model", "tokenizer", "tokenizer_config");
  await Promise.all([loadGallery(downloads), loadTexts(downloads, manifest)]);
  ready.texts.resolve();
  await loadImages(manifest);
  ready.images.resolve();
  showProgress(null);
  find("#place").textContent = kept ? "Works offline" : "On your machine";
}

async function loadGallery(downloads) {
  const [table, pictures, embeddings] = await Promise.all([
    downloads.json("gallery"),
    downloads.bytes("pictures"),
    downloads.bytes("embeddings"),
  ]);
  gallery = new Gallery(table, pictures, embeddings);
  table.styles.forEach((style, number) => find("#style").append(new Option(style, number)));
  showCredits(table.sets);
  search(); // also what was asked for before
}

async function loadTexts(downloads, manifest) {
  const prepared = downloads.bytes("runtime").then((wasm) => engine.prepare(wasm));
  const [graph, tokenizer, tokenizerConfig] = await Promise.all([
    downloads.bytes("text_model"),
    downloads.json("tokenizer"),
    downloads.json("tokenizer_config"),
    prepared,
  ]);
  showProgress(1, "Starting the model …");
  await engine.loadTexts({ graph, tokenizer, tokenizerConfig, settings: manifest.texts });
}

async function loadImages(manifest) {
  const downloads = new Downloads(manifest.files, (done, all) =>
    showProgress(done / all, "Words can be searched for. Pictures, too, in a moment …"),
  );
  downloads.expect("vision_model");
  await engine.loadImages({ graph: await downloads.bytes("vision_model"), settings: manifest.images });
}

function explain(error) {
  for (const part of Object.values(ready)) part.reject(error);
  if (error instanceof FailedDownload) {
    forget(error.file);
    showProblem("A download failed", `${error.message}. Is there a network?`, () => location.reload());
  } else {
    showProblem("The search could not be started", error.message, () => location.reload());
  }
}

// ---------------------------------------------------------------------------------------------------- searching

const status = (words) => (find("#status").textContent = words);
const count = (number) => number.toLocaleString("en");

/** The embedding of what is asked for, how it is called, and how long that took. */
async function embed(question) {
  const { kind, text, picture, index, files = 1, reading = 0 } = question;
  if (kind === "icon") return { embedding: gallery.embedding(index), called: `like “${gallery.icon(index).name}”` };
  await (kind === "picture" ? ready.images : ready.texts);
  if (question !== asked) return null; // asked while the model was loading, and nobody waits for it now
  const start = performance.now();
  const found = await (kind === "picture" ? engine.embedImage(picture) : engine.embedText(text));
  const mine = files > 1 ? `like your picture, one of ${count(files)} files` : "like your picture";
  const called = kind === "picture" ? mine : `for “${shortened(text)}”`;
  const cut = found.cut ? ", of which only the beginning was read" : "";
  return { ...found, called: `${called}${cut}`, milliseconds: reading + performance.now() - start };
}

/** The same, once for each question. */
function embedded(question) {
  return (question.embedded ??= embed(question));
}

/** Searches for what is asked for; a newer question makes an older answer void. */
export async function search() {
  const question = asked;
  if (question.kind === "nothing") return browse();
  if (!gallery) return status("Loading …");
  const style = find("#style").value === "" ? null : Number(find("#style").value);
  try {
    const isNew = question.embedded === undefined;
    const found = await embedded(question);
    if (question !== asked) return;
    const start = performance.now();
    hits = gallery.search(found.embedding, style, question.index ?? null);
    show();
    const before = isNew ? (found.milliseconds ?? 0) : 0;
    const milliseconds = Math.max(1, Math.round(before + performance.now() - start));
    status(`The nearest of ${count(gallery.length)} icons ${found.called} · ${count(milliseconds)} ms`);
  } catch (error) {
    if (question !== asked) return;
    hits = [];
    show();
    status(error instanceof Refusal ? error.message : "");
    if (!(error instanceof Refusal) && find("#problem").hidden) explain(error);
  }
}

/** Without a question: icons from all over the gallery. */
function browse() {
  if (!gallery) return;
  const style = find("#style").value;
  const all = Array.from({ length: gallery.length }, (_, index) => (index * 1009) % gallery.length);
  hits = all
    .filter((index) => style === "" || gallery.table.style_of[index] === Number(style))
    .map((index) => ({ index }));
  show();
  status(`${count(hits.length)} icons`);
}

function show() {
  const walked = find("#hits").contains(document.activeElement);
  clearHits();
  shown = 0;
  showMore();
  if (walked) focusHit(0); // it stays where it was, not at the top of the page
}

function showMore() {
  const open = (hit) => showDetail(gallery, hit, searchLike, description({ kind: "icon", index: hit.index }));
  appendHits(gallery, hits.slice(shown, shown + PAGE), open);
  shown = Math.min(hits.length, shown + PAGE);
  find("#more").hidden = shown >= hits.length;
}

// ---------------------------------------------------------------------------------------------------- questions

function ask(question) {
  asked = question;
  turn++;
  const words = question.kind === "words" ? question.text : "";
  if (words || !find("#words").matches(":focus")) find("#words").value = words;
  history.replaceState(null, "", words ? `#q=${encodeURIComponent(words)}` : location.pathname);
  showAsked(question);
  return search();
}

function searchWords(text) {
  return ask(text.trim() ? { kind: "words", text: text.trim() } : { kind: "nothing" });
}

function searchLike(index) {
  find("#words").blur();
  scrollTo({ top: 0 });
  return ask({ kind: "icon", index });
}

/** Searches by one of these files; `files` are how many there were, which the answer tells. */
async function searchPicture(...files) {
  const file = pictureAmong(files);
  const mine = ++turn;
  find("#detail").close();
  find("#words").blur();
  try {
    const start = performance.now();
    const picture = await readPicture(file);
    if (mine !== turn) return;
    const reading = performance.now() - start;
    const search = ask({ kind: "picture", picture, name: file.name, files: files.length, reading });
    if (!find("#loading").hidden) status("Your picture is searched for as soon as everything is loaded …");
    await search;
  } catch (error) {
    if (mine === turn) status(error.message);
  }
}

/** The button that has what is asked for described; null where nothing can be. */
function description(question) {
  if (!captions) return null;
  const describe = async (report) => captions.describe(await pixelValues(question), report);
  return describeBox(describe, () => captions.missingBytes());
}

async function pixelValues(question) {
  if (question.kind === "picture") return (await embedded(question)).values;
  const { data, width, height } = await readPicture(gallery.blob(question.index));
  return toPixelValues(data, width, height, imageSettings);
}

/** The picture or icon that is searched by, beside a button that ends it. */
function showAsked(question) {
  const { kind, index, picture } = question;
  const box = find("#asked");
  box.hidden = kind !== "picture" && kind !== "icon";
  if (box.hidden) return;
  const image = kind === "icon" ? element("img", { src: gallery.url(index), alt: "" }) : picture.preview;
  find(".tile", box).replaceChildren(image);
  const name = kind === "icon" ? gallery.icon(index).name : shortened(question.name || "your picture");
  find("div", box).replaceChildren(element("p", {}, name), description(question) ?? "");
}

// --------------------------------------------------------------------------------------------------- the visitor

function listen() {
  let pause;
  find("#words").addEventListener("input", (event) => {
    clearTimeout(pause);
    pause = setTimeout(() => searchWords(event.target.value), TYPING_PAUSE);
  });
  find("#search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(pause);
    searchWords(find("#words").value);
  });
  find("#style").addEventListener("change", search);
  find("#more").addEventListener("click", () => {
    const next = shown;
    showMore();
    focusHit(next);
  });
  find("#asked > button").addEventListener("click", ({ detail }) => {
    ask({ kind: "nothing" });
    if (detail === 0) find("#words").focus(); // pressed by a key: the button is gone
  });
  find("#choose").addEventListener("click", () => find("#file").click());
  find("#file").addEventListener("change", ({ target }) => {
    if (target.files.length) searchPicture(...target.files);
    target.value = "";
  });
  find("#hits").addEventListener("keydown", walkHits);
  find("#detail").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) event.currentTarget.close(); // beside what it shows
  });
  addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, textarea") || find("#detail").open;
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    find("#words").select();
    find("#words").focus();
  });
  addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const isText = types.includes("text/plain") && types.includes("text/html"); // office programs add a picture of it
    if (!files.length || (isText && event.target.matches("input"))) return;
    event.preventDefault();
    searchPicture(...files);
  });
  addEventListener("hashchange", searchHash);
  listenToDrops();
}

function listenToDrops() {
  const over = (is) => document.body.classList.toggle("over", is);
  const holds = (event, type) => event.dataTransfer?.types.includes(type);
  // Text within the field is the browser's. Elsewhere browsers would leave the page for a link.
  const isTheirs = (event) => !holds(event, "Files") && event.target.matches?.("input");
  addEventListener("dragover", (event) => {
    if (isTheirs(event)) return;
    event.preventDefault();
    over(holds(event, "Files"));
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
  addEventListener("drop", (event) => {
    over(false);
    if (isTheirs(event)) return;
    event.preventDefault();
    if (holds(event, "Files")) return searchDropped(event.dataTransfer);
    if (holds(event, "text/uri-list")) return status("The page opens no links: save the picture, and drop the file.");
    searchWords(event.dataTransfer.getData("text/plain").slice(0, find("#words").maxLength));
  });
}

function searchDropped({ files, items }) {
  const folders = [...items].filter((item) => item.webkitGetAsEntry?.()?.isDirectory).length;
  if (folders && folders === files.length) return status("That is a folder: drop a picture of it.");
  searchPicture(...files);
}

function searchHash() {
  const words = new URLSearchParams(location.hash.slice(1)).get("q");
  if (words) {
    find("#words").value = words;
    searchWords(words);
  }
}

function showExamples() {
  const chips = EXAMPLES.map((text) =>
    element("button", { type: "button", class: "chip", onclick: () => searchWords(text) }, text),
  );
  find("#examples span").replaceChildren(...chips);
}

const missing = missingFeature();
if (missing) {
  showProblem(
    "This browser can't run the search",
    `It has no ${missing}. Chrome, Edge, Firefox and Safari have it since 2023: please use a newer one.`,
    null,
  );
} else {
  showExamples();
  listen();
  searchHash();
  load().catch(explain);
}
