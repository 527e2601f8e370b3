// Files to pixels: whatever picture the browser can show, and SVG drawings.

import { isGzipped, unpack } from "./download.js";
import { Refusal, shortened } from "./texts.js";

const SVG_SIDE = 256; // pixels of the larger side, as the Python processor renders drawings
const MOST_SVG_BYTES = 8 * 2 ** 20;
const MOST_BYTES = 50 * 2 ** 20;
const MOST_PIXELS = 2 ** 24; // a larger picture is made smaller while it is read
const MOST_SIDE = 2 ** 14; // of a canvas, in all browsers; beyond it some stay blank without a word
const PREVIEW_SIDE = 120;

/** Of dropped or pasted files the one to search by: the first that its type or name calls a picture, or the first. */
export function pictureAmong(files) {
  const isPicture = (file) => file.type.startsWith("image/") || /\.svgz?$/i.test(file.name ?? "");
  return files.find(isPicture) ?? files[0];
}

/**
 * A file → `data` (height, width, 4) bytes, upright, colours not multiplied by opacity; `width`, `height`; and a
 * `preview`, a small canvas of what was read.
 *
 * @throws Refusal for what is no picture.
 */
export async function readPicture(file) {
  if (file.size > MOST_BYTES) throw new Refusal(`“${nameOf(file)}” is larger than ${MOST_BYTES / 2 ** 20} MB.`);
  const drawing = await svgText(file);
  if (drawing !== null) return renderSvg(drawing, nameOf(file));
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
    if (bitmap.width * bitmap.height > MOST_PIXELS) bitmap = await smaller(bitmap);
  } catch {
    throw new Refusal(`“${nameOf(file)}” is not a picture that this browser can read.`);
  }
  const picture = pixelsOf(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  return picture;
}

const nameOf = (file) => shortened(file.name ?? "The picture");

async function smaller(bitmap) {
  const scale = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  const options = { resizeQuality: "high", premultiplyAlpha: "none" };
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.floor(side * scale)));
  const made = await createImageBitmap(bitmap, { ...options, resizeWidth: width, resizeHeight: height });
  bitmap.close();
  return made;
}

function pixelsOf(source, width, height) {
  const scale = Math.min(1, PREVIEW_SIDE / Math.max(width, height));
  const preview = canvasOf(...[width, height].map((side) => Math.max(1, Math.round(side * scale))));
  preview.context.imageSmoothingQuality = "high";
  preview.context.drawImage(source, 0, 0, preview.canvas.width, preview.canvas.height);
  return { ...readPixels(source, width, height), preview: preview.canvas };
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return { canvas, context: canvas.getContext("2d", { willReadFrequently: true }) };
}

/** The pixels of what can be drawn on a canvas, tile by tile where it is larger than a canvas can be. */
function readPixels(source, width, height) {
  const side = [width, height].map((length) => Math.min(length, MOST_SIDE));
  const { context } = canvasOf(...side);
  if (side[0] === width && side[1] === height) {
    context.drawImage(source, 0, 0, width, height);
    return { data: context.getImageData(0, 0, width, height).data, width, height };
  }
  const data = new Uint8ClampedArray(4 * width * height);
  for (let top = 0; top < height; top += MOST_SIDE) {
    for (let left = 0; left < width; left += MOST_SIDE) {
      const [columns, rows] = [Math.min(MOST_SIDE, width - left), Math.min(MOST_SIDE, height - top)];
      context.clearRect(0, 0, columns, rows);
      context.drawImage(source, left, top, columns, rows, 0, 0, columns, rows);
      const tile = context.getImageData(0, 0, columns, rows).data;
      for (let row = 0; row < rows; row++) {
        const line = tile.subarray(4 * row * columns, 4 * (row + 1) * columns);
        data.set(line, 4 * ((top + row) * width + left));
      }
    }
  }
  return { data, width, height };
}

// --------------------------------------------------------------------------------------------------------- SVG

/** The text of an SVG drawing, packed (svgz) or not; null for any other file, whatever it is called. */
async function svgText(file) {
  const name = nameOf(file);
  const unreadable = () => {
    throw new Refusal(`“${name}” can't be read: is it a folder, or no longer there?`);
  };
  const head = new Uint8Array(await file.slice(0, 2 ** 16).arrayBuffer().catch(unreadable));
  const named = file.type === "image/svg+xml" || /\.svgz?$/i.test(file.name ?? "");
  const opening = decoded(head).trimStart();
  const isText = named ? opening.startsWith("<") : /^(<\?xml|<!--|<!DOCTYPE svg|<svg[\s>])/.test(opening);
  if (!isText && !(named && isGzipped(head))) return null;
  if (file.size > MOST_SVG_BYTES) throw new Refusal(`“${name}” is too large a drawing.`);
  const bytes = new Uint8Array(await file.arrayBuffer().catch(unreadable));
  try {
    return decoded(isGzipped(head) ? await unpack(bytes) : bytes);
  } catch {
    throw new Refusal(`“${name}” is a broken SVG drawing.`);
  }
}

/** The text of bytes, by the byte order mark that they begin with; without one it is UTF-8. */
function decoded(bytes) {
  const [first, second] = new Uint8Array(bytes);
  const encoding = first === 0xff && second === 0xfe ? "utf-16le" : first === 0xfe && second === 0xff ? "utf-16be" : "";
  const text = new TextDecoder(encoding || "utf-8").decode(bytes);
  return encoding ? text.replace(/^\s*<\?xml[^>]*\?>/, "") : text; // which names the encoding that it no longer has
}

/** A drawing as `readPicture` has it, SVG_SIDE pixels on its larger side. An image can neither run code nor fetch. */
async function renderSvg(text, name) {
  const refusal = new Refusal(`“${name}” is a broken SVG drawing.`);
  const root = parseSvg(text);
  if (root === null) throw refusal;
  const [width, height] = sizeOf(root);
  if (!(width > 0 && height > 0)) throw new Refusal(`“${name}” does not say how large it is.`);
  if (!root.hasAttribute("viewBox")) root.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const scale = SVG_SIDE / Math.max(width, height);
  const [columns, rows] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  root.setAttribute("width", columns);
  root.setAttribute("height", rows);
  const url = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(root)], { type: "image/svg+xml" }));
  try {
    const image = new Image(columns, rows);
    image.src = url;
    await image.decode();
    return pixelsOf(image, columns, rows);
  } catch {
    throw refusal;
  } finally {
    URL.revokeObjectURL(url);
  }
}

function parseSvg(text) {
  const parse = (source) => new DOMParser().parseFromString(source, "image/svg+xml").documentElement;
  let root = parse(text.trim());
  if (root.localName === "svg" && root.namespaceURI === null) {
    root = parse(text.trim().replace(/<svg\b/, '<svg xmlns="http://www.w3.org/2000/svg"'));
  }
  return root.localName === "svg" && !root.querySelector("parsererror") ? root : null;
}

/** Width and height: those of the drawing, or of its view box where they are missing or percentages. */
function sizeOf(root) {
  const box = (root.getAttribute("viewBox") ?? "").trim().split(/[\s,]+/).map(Number);
  return ["width", "height"].map((side, index) => {
    const given = (root.getAttribute(side) ?? "100%").trim();
    const number = Number.parseFloat(given);
    return given.endsWith("%") ? (number / 100) * box[2 + index] : number * pixelsPer(given);
  });
}

function pixelsPer(length) {
  const units = { pt: 4 / 3, pc: 16, mm: 96 / 25.4, cm: 96 / 2.54, in: 96, em: 16, ex: 8 };
  return units[length.slice(-2)] ?? 1;
}
