// Runs the page's towers in Node, for test_static_page.py: its request on standard input, its answer as JSON.
//
// {page, text, image, rows: [[[id, ...], ...], ...], pixels: [[value, ...], ...], side} -> embeddings of each batch
// and with {decoder, captions: settings} -> ids of a caption for each picture of the second batch

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { gunzipSync } from "node:zlib";

const request = JSON.parse(readFileSync(0));
const page = pathToFileURL(`${request.page}/`);
const read = (path) => {
  const data = readFileSync(path);
  return path.endsWith(".gz") ? gunzipSync(data) : data;
};
const runtime = await import(new URL("vendor/ort.wasm.min.mjs", page));
const { Captioner, ImageTower, prepareRuntime, TextTower } = await import(new URL("model.js", page));

prepareRuntime(runtime, read(`${request.page}/vendor/ort-wasm-simd-threaded.wasm.gz`), 1);
const texts = await TextTower.load(runtime, read(request.text), null, {});
const images = await ImageTower.load(runtime, read(request.image), { width: request.side, height: request.side });
const answer = { texts: [], images: [] };
for (const rows of request.rows) answer.texts.push(Array.from((await texts.run(rows)).data));
for (const pixels of request.pixels) {
  const values = Float32Array.from(pixels);
  const count = values.length / (3 * request.side ** 2);
  answer.images.push(Array.from((await images.run(values, count)).data));
}
if (request.captions) {
  const captioner = await Captioner.load(runtime, read(request.decoder), images, null, request.captions);
  const size = 3 * request.side ** 2;
  answer.captions = [];
  for (let from = 0; from < request.pixels[1].length; from += size) {
    answer.captions.push(await captioner.write(Float32Array.from(request.pixels[1].slice(from, from + size))));
  }
}
console.log(JSON.stringify(answer));
