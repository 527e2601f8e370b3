// Keeps the page for visits without a network: its own files by version, the large ones by their hash.

importScripts("data/version.js"); // BUILD: version, shell, files

const SHELL = `shell-${BUILD.version}`;
const FILES = "files";
const scope = self.registration.scope;
const absolute = (path) => new URL(path, scope).href;

self.addEventListener("install", (event) => {
  const requests = BUILD.shell.map((path) => new Request(absolute(path), { cache: "no-cache" }));
  event.waitUntil(
    caches
      .open(SHELL)
      .then((cache) => cache.addAll(requests))
      .then(() => self.skipWaiting()),
  );
});

async function removeOld() {
  for (const name of await caches.keys()) {
    if (name.startsWith("shell-") && name !== SHELL) await caches.delete(name);
  }
  const kept = new Set(BUILD.files.map(absolute));
  const cache = await caches.open(FILES);
  for (const request of await cache.keys()) {
    if (!kept.has(request.url)) await cache.delete(request);
  }
}

self.addEventListener("activate", (event) => event.waitUntil(removeOld().then(() => self.clients.claim())));

async function answer(request) {
  const url = new URL(request.url);
  if (request.mode === "navigate") return (await caches.match(absolute("./"))) ?? fetch(request);
  if (!BUILD.files.map(absolute).includes(url.href)) return (await caches.match(request)) ?? fetch(request);
  const cache = await caches.open(FILES);
  const found = await cache.match(request);
  if (found) return found;
  const response = await fetch(request);
  // A copy that breaks off, or finds the disk full, is not kept: the page itself goes on.
  if (response.ok) cache.put(request, response.clone()).catch(() => {});
  return response;
}

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method === "GET" && url.href.startsWith(scope)) event.respondWith(answer(event.request));
});

// The page asks for a file to be forgotten that turned out to be another one.
self.addEventListener("message", (event) => {
  const address = event.data?.forget;
  if (address) event.waitUntil(caches.open(FILES).then((cache) => cache.delete(absolute(address))));
});
