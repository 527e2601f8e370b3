"""Serves the page on this machine, with the headers that a Space sends: threads need them.

python space-static/serve_page.py --port 7861
"""

import argparse
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# As `custom_headers` in README.md has them.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".gz": "application/gzip",
        ".webmanifest": "application/manifest+json",
    }

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a browser that leaves in the middle of a download
            super().handle_error(request, client_address)


def server(port: int, folder: Path = FOLDER) -> ThreadingHTTPServer:
    """A server of the page for this machine alone; port 0 takes a free one.

    Raises:
        OSError, OverflowError: the port is taken, not allowed or none.
    """
    return Server(("127.0.0.1", port), functools.partial(Handler, directory=str(folder)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7861)
    port = parser.parse_args().port
    if not (FOLDER / "data" / "manifest.json").is_file():
        sys.exit("the page has no data yet: python space-static/build_page.py")
    try:
        running = server(port)
    except (OSError, OverflowError) as error:
        sys.exit(f"port {port} can't be used, choose another --port: {getattr(error, 'strerror', None) or error}")
    print(f"http://127.0.0.1:{running.server_address[1]}", flush=True)
    try:
        running.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
