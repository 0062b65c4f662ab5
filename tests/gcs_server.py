"""A Google Cloud Storage in memory, as far as gcsfs, TensorStore and orbax use it.

Run as a script, it serves one bucket at the port that it prints, until it is ended.
"""

import contextlib
import itertools
import json
import re
import threading
from email.message import EmailMessage
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

OBJECT = r"/storage/v1/b/([^/]+)/o/([^/]+)"


class Failed(Exception):
    """The status of a request that can't be answered."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    objects: dict[str, tuple[bytes, int]] = {}  # content and generation, by name
    uploads: dict[str, tuple[str, dict, bytes]] = {}  # of several requests, by number
    generations = itertools.count(1)

    def answer(self):
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with self.lock:
            try:
                status, headers, content = self.find(url.path, query, body)
            except Failed as failed:
                status, headers, content = failed.args[0], {}, b""
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(content)))
        with contextlib.suppress(ConnectionError):  # who asked has been killed
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass

    def find(self, path, query, body):
        """The status, headers and content of the answer."""
        if path.startswith("/batch/"):
            return self.batch(body)
        if path.startswith("/upload/"):
            return self.upload(path, query, body)
        path = path.removeprefix("/download")
        if found := re.fullmatch(f"{OBJECT}/(?:rewriteTo|copyTo)/b/[^/]+/o/(.+)", path):
            content, _ = self.get(unquote(found[2]), {})
            resource = self.put(unquote(found[3]), content, query)
            return 200, {}, {"done": True, "resource": resource}
        if re.fullmatch("/storage/v1/b/[^/]+/o", path):
            return 200, {}, self.list(query)
        if re.fullmatch("/storage/v1/b/[^/]+", path):
            return 200, {}, {"kind": "storage#bucket", "name": "bucket", "id": "bucket"}
        if found := re.fullmatch(OBJECT, path):
            return self.one(unquote(found[2]), query)
        raise Failed(404)

    def one(self, name, query):
        content, generation = self.get(name, query)
        if self.command == "DELETE":
            del self.objects[name]
            return 204, {}, b""
        if query.get("alt") != "media":
            return 200, {}, self.resource(name)
        status, headers = 200, {"x-goog-generation": generation}
        if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(span[1]) if span[1] else max(len(content) - int(span[2]), 0)
            last = int(span[2]) if span[1] and span[2] else len(content) - 1
            last = min(last, len(content) - 1)
            if first > last:
                raise Failed(416)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        return status, headers, content

    def get(self, name, query):
        content, generation = self.objects.get(name, (b"", 0))
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Failed(412)
        if not generation:
            raise Failed(404)
        if query.get("ifGenerationNotMatch") == str(generation):
            raise Failed(304)
        return content, generation

    def put(self, name, content, query):
        _, generation = self.objects.get(name, (b"", 0))
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Failed(412)
        self.objects[name] = content, next(self.generations)
        return self.resource(name)

    def resource(self, name):
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.resource(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def upload(self, path, query, body):
        if "upload_id" in query:  # a part of a resumable one
            name, how, before = self.uploads[query["upload_id"]]
            content = before + body
            self.uploads[query["upload_id"]] = name, how, content
            if self.headers.get("Content-Range", "").endswith("/*"):
                return 308, {"Range": f"bytes=0-{len(content) - 1}"}, b""
            return 200, {}, self.put(name, content, how)
        if query["uploadType"] == "media":
            return 200, {}, self.put(query["name"], body, query)
        if query["uploadType"] == "multipart":
            first, second = self.parts(body)
            name = query.get("name") or json.loads(first)["name"]
            return 200, {}, self.put(name, second, query)
        name = query.get("name") or json.loads(body)["name"]
        number = str(len(self.uploads))
        self.uploads[number] = name, query, b""
        where = f"http://{self.headers['Host']}{path}?upload_id={number}"
        return 200, {"Location": where}, b""

    def parts(self, body):
        """The contents of a multipart body."""
        boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1]
        parts = body.split(b"--" + boundary.encode())[1:-1]
        parts = [re.split(b"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts]
        return [re.sub(b"\r?\n$", b"", part) for part in parts]

    def batch(self, body):
        """Deletes several objects."""
        boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1]
        answer = ""
        for part in body.split(b"--" + boundary.encode())[1:-1]:
            headers, _, request = part.strip().partition(b"\r\n\r\n")
            number = BytesParser(EmailMessage).parsebytes(headers)["Content-ID"]
            target = request.split()[1].decode()
            found = re.fullmatch(OBJECT, urlsplit(target).path)
            gone = self.objects.pop(unquote(found[2]), None)
            status = "404 Not Found" if gone is None else "204 No Content"
            answer += (
                f"--answer\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{number.strip('<>')}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        kind = {"Content-Type": "multipart/mixed; boundary=answer"}
        return 200, kind, (answer + "--answer--\r\n").encode()


def read(name):
    """What an object holds, as text."""
    return Handler.objects[name][0].decode()


def serve():
    """A server at a free port, and the environment that leads its users to it."""
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    url = f"http://localhost:{server.server_port}"
    return server, {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


if __name__ == "__main__":
    server, environment = serve()
    for name, value in environment.items():
        print(f"export {name}={value}", flush=True)
    server.serve_forever()
