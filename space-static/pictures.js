// Files to pixels: whatever picture the browser can show, and SVG drawings.

import { isGzipped, unpack } from "./download.js";
import { Refusal, shortened } from "./texts.js";

const SVG_SIDE = 256; // pixels of the larger side, as the Python processor renders drawings
const MOST_SVG_BYTES = 8 * 2 ** 20;
const MOST_BYTES = 50 * 2 ** 20;
const MOST_PIXELS = 2 ** 24; // the largest canvas of all browsers; a larger picture is made smaller while it is read

/**
 * A file → ImageData, upright, colours not multiplied by opacity.
 *
 * @throws Refusal for what is no picture.
 */
export async function readPicture(file) {
  if (file.size > MOST_BYTES) throw new Refusal(`“${shortened(file.name)}” is larger than ${MOST_BYTES / 2 ** 20} MB.`);
  const drawing = await svgText(file);
  if (drawing !== null) return renderSvg(drawing, file.name);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
    if (bitmap.width * bitmap.height > MOST_PIXELS) bitmap = await smaller(bitmap);
  } catch {
    throw new Refusal(`“${shortened(file.name)}” is not a picture that this browser can read.`);
  }
  return pixelsOf(bitmap, bitmap.width, bitmap.height);
}

/** A file as `<img>` shows it: a drawing from a system that does not know its type is given it. */
export function typed(file) {
  const isDrawing = file.type === "" && /\.svg$/i.test(file.name ?? "");
  return isDrawing ? new Blob([file], { type: "image/svg+xml" }) : file;
}

async function smaller(bitmap) {
  const scale = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  const options = { resizeQuality: "high", premultiplyAlpha: "none" };
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.floor(side * scale)));
  return createImageBitmap(bitmap, { ...options, resizeWidth: width, resizeHeight: height });
}

function pixelsOf(source, width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// --------------------------------------------------------------------------------------------------------- SVG

/** The text of an SVG drawing, packed (svgz) or not; null for any other file. */
async function svgText(file) {
  const head = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  const named = file.type === "image/svg+xml" || /\.svgz?$/i.test(file.name ?? "");
  const opening = await file.slice(0, 2 ** 16).text();
  if (!named && !/^\s*(<\?xml|<!--|<!DOCTYPE svg|<svg[\s>])/.test(opening)) return null;
  if (file.size > MOST_SVG_BYTES) throw new Refusal(`“${shortened(file.name)}” is too large a drawing.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  return new TextDecoder().decode(isGzipped(head) ? await unpack(bytes) : bytes);
}

/** A drawing as ImageData whose larger side has SVG_SIDE pixels. As an image it can neither run code nor fetch. */
async function renderSvg(text, name) {
  const refusal = new Refusal(`“${shortened(name)}” is a broken SVG drawing.`);
  const root = parseSvg(text);
  if (root === null) throw refusal;
  const [width, height] = sizeOf(root);
  if (!(width > 0 && height > 0)) throw new Refusal(`“${shortened(name)}” does not say how large it is.`);
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
