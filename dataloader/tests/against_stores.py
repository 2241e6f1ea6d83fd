#!/usr/bin/env python3
"""Compares what `dataloader` reads from real stores, through an unreliable network, with the same files on disk; and tests
runs that are kept in S3 and in Azure (fake-gcs-server does not accept the writes of object_store).

    python against_stores.py DATALOADER

S3 is versitygw, Google Cloud Storage fake-gcs-server, Azure Blob Storage Azurite, the web server nginx, all started
here and filled by the providers' own clients. Between them and the program stands a proxy that answers some requests
with 503, cuts some answers in the middle, and lets some hang.

The Hugging Face hub alone has no server to start: a small one speaks the part of its API that listings and files need,
as Hugging Face's own client reads it, and sends to nginx for the contents.
"""

import gzip
import http.server
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import azure.storage.blob
import boto3
import botocore.config
import huggingface_hub
import pyarrow
import pyarrow.parquet
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage as google_storage

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent.parent / "tests/golden/tiny/tokenizer.model"
SECRET = "only-the-servers-know-this-key"
# Counted fields that do not depend on the store.
SAME = ["documents", "characters", "bytes", "short_characters", "short_tokens", "held_out", "tokens", "files"]
# Azurite's well-known account.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

failures = []


def check(name, condition, told=""):
    print(f"{'ok    ' if condition else 'FAILED'} {name}{'' if condition else f': {told}'}", flush=True)
    if not condition:
        failures.append(name)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit(f"nothing listens on port {port}")


class Faults(threading.Thread):
    """A proxy with one request per connection. Every third one fails, each time in another way, and the answer to the
    first request that completes an upload is lost."""

    def __init__(self, port, host=None):
        super().__init__(daemon=True)
        self.target, self.requests, self.faults = port, 0, {"503": 0, "cut": 0, "hang": 0}
        self.heads, self.host, self.ended = [], host, False
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, client):
        head = b""
        while b"\r\n\r\n" not in head:
            more = client.recv(65536)
            if not more:
                return
            head += more
        head, body = head.split(b"\r\n\r\n", 1)
        head += b"\r\n\r\n"
        length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head, re.IGNORECASE)
        while length and len(body) < int(length[1]):
            more = client.recv(1 << 16)
            if not more:
                return
            body += more
        self.heads.append(head)
        self.requests += 1
        fault = None
        if self.requests % 3 == 0:
            fault = ["503", "cut", "hang", "cut"][self.requests // 3 % 4]
            self.faults[fault] += 1
        elif head.startswith(b"POST ") and b"uploadId=" in head.split(b"\r\n")[0] and not self.ended:
            self.ended, fault = True, "lost"
        with client:
            if fault == "503":
                client.sendall(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                return
            if fault == "hang":
                client.settimeout(30)
                client.recv(1)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                line, rest = head.split(b"\r\n", 1)
                if self.host:
                    rest = rest.replace(f"127.0.0.1:{self.port}".encode(), self.host.encode())
                server.sendall(line + b"\r\nconnection: close\r\n" + rest + body)
                answer = b""
                while more := server.recv(1 << 16):
                    answer += more
                if fault == "lost":
                    return
                try:
                    client.sendall(answer[: len(answer) // 2] if fault == "cut" else answer)
                except ConnectionError:
                    pass


def make_corpus(folder):
    """Writes files of every format, with several units each."""
    draw = random.Random(7)
    words = [" " + "".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3000)]

    def text():
        return "".join(draw.choices(words, k=draw.randint(20, 1500)))[1:]

    (folder / "sub").mkdir(parents=True)
    for number in range(3):
        # The first file is too large for a single request.
        lines = "".join(json.dumps({"text": text()}) + "\n" for _ in range(800 if number else 2800))
        (folder / f"lines-{number:05}.jsonl").write_text(lines)
        table = pyarrow.table({"url": ["x"] * 500, "content": [text() for _ in range(500)]})
        pyarrow.parquet.write_table(table, folder / "sub" / f"part {number}.parquet", row_group_size=50)
        members = [
            gzip.compress("".join(json.dumps({"text": text()}) + "\n" for _ in range(400)).encode()) for _ in range(3)
        ]
        (folder / f"lines-{number:05}.json.gz").write_bytes(b"".join(members))


def plan(path, url, more="", list_file=None, by_name=False):
    """A plan with one source for each format."""
    sources = [("lines", "lines-*.jsonl", "text"), ("parquet", "sub/*.parquet", "content"), ("gzip", "*.json.gz", "text")]
    listed = f'list = "{list_file}"\n' if list_file else ""
    text = "".join(
        f'[[data.source]]\nname = "{name}"\nurl = "{url}{"/" + name if by_name else ""}"\nfiles = ["{files}"]\ntext = "{key}"\ntokens = 1\n{listed}'
        for name, files, key in sources
    )
    path.write_text(
        f'[model]\npreset = "openelm-270m"\n[train]\nsequences = 1\nmicro_batch = 1\n[tokenizer]\nfile = "{TOKENIZER}"\n'
        f'[data]\nunit = "1MiB"\nrequest_timeout = "1s"\nlanes = 1\nthreads = 4\n{more}{text}'
    )
    return path


def count(program, plan_path, environment):
    """The program's exit code for a plan, and what it counts in each source, by name, or its message."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "GOOGLE_", "AZURE_", "HF_"))}
    done = subprocess.run(
        [program, "count", "--json", "--plan", str(plan_path)],
        env=clean | {"HOME": "/nonexistent"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        return done.returncode, done.stderr
    return 0, {source["source"]: source for source in json.loads(done.stdout)}


def mirror(program, plan_path, to, environment, *more):
    """Numbers of files copied, bytes copied, and files that existed."""
    done = subprocess.run(
        [program, "mirror", "--plan", str(plan_path), "--to", to, *more],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return [int(number) for number in re.findall(r"\d+", done.stdout.split("\n")[0])] if done.returncode == 0 else done.stderr


def same(found, expected):
    return all(found[name][key] == expected[name][key] for name in expected for key in SAME)


class Hub(http.server.ThreadingHTTPServer):
    """Serves listings and redirects like the hub, for one dataset whose files are on a web server."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder, contents_port):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.folder, self.contents_port, self.tokens, self.resolved, self.refused = folder, contents_port, [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        hub.tokens.append(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != "Bearer hub-token":
            return self.answer(401)
        resolve = f"/datasets/lab/texts/resolve/{hub.commit}/"
        if path in ("/api/datasets/lab/texts/revision/main", "/api/datasets/lab/texts/revision/v1"):
            return self.answer(200, json.dumps({"id": "lab/texts", "sha": hub.commit, "siblings": []}).encode())
        if path.startswith(f"/api/datasets/lab/texts/tree/{hub.commit}"):
            below = path.removeprefix(f"/api/datasets/lab/texts/tree/{hub.commit}").strip("/")
            files = sorted(file for file in hub.folder.rglob("*") if (hub.folder / below) in file.parents)
            entries = []
            for file in files:
                name = str(file.relative_to(hub.folder))
                kind = "directory" if file.is_dir() else "file"
                entries.append({"type": kind, "oid": "b" * 40, "size": 0 if file.is_dir() else file.stat().st_size, "path": name})
            # A page has four entries.
            at = int(query.get("cursor", ["0"])[0])
            headers = {}
            if at + 4 < len(entries):
                query_next = urllib.parse.urlencode({"recursive": "true", "cursor": at + 4})
                headers["Link"] = f'<{hub.url}{url.path}?{query_next}>; rel="next"'
            return self.answer(200, json.dumps(entries[at : at + 4]).encode(), **headers)
        if path.startswith(resolve):
            hub.resolved += 1
            # The hub's rate limit is reached once.
            if hub.resolved == 2:
                hub.refused += 1
                return self.answer(429, RateLimit='"resolvers";r=0;t=2')
            name = path.removeprefix(resolve)
            file = hub.folder / name
            if not file.is_file():
                return self.answer(404)
            place = f"http://127.0.0.1:{hub.contents_port}/{urllib.parse.quote(name)}?signature=x"
            return self.answer(302, Location=place, X_Repo_Commit=hub.commit, X_Linked_Size=str(file.stat().st_size), ETag='"b"')
        return self.answer(404)


def keep_run(program, place, name, url, environment):
    """The rows of the loss curve of a small run that is kept at `url`, or what went wrong."""
    folder = place / f"run in {name}"
    folder.mkdir()
    (folder / "plan.toml").write_text(
        f'[run]\nname = "small"\n[store]\nurl = "{url}"\n[local]\nworkers = 2\n[tokenizer]\nfile = "{TOKENIZER}"\n'
        "[model]\nmax_context_length = 128\nnum_transformer_layers = 2\nmodel_dim = 64\nhead_dim = 16\nnum_gqa_groups = 2\n"
        f'[data]\nunit = "256KiB"\nlanes = 4\nthreads = 1\nholdout = 0.05\n[[data.source]]\nname = "lines"\nurl = "{place}/corpus"\n'
        'files = ["lines-*1.jsonl"]\ntext = "text"\n[train]\niterations = 12\nsequences = 8\nmicro_batch = 2\nwarmup = 2\n'
        "held_out_every = 0\n[checkpoint]\nevery = 4\naverage = 2\n[evaluate]\ntext = \"4KiB\"\n[benchmark]\ngenerate = 4\nruns = 1\n"
    )
    done = subprocess.run(
        [str(Path(program).resolve().with_name("coordinator")), "--plan", "plan.toml"],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )
    if done.returncode != 0:
        return done.stdout[-1000:] + done.stderr[-1000:]
    rows = (folder / "runs/small/metrics.csv").read_text().splitlines()
    return [row.split(",")[:6] for row in rows]


def start(processes, *command, **more):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    processes.append(process)
    return process


def main():
    program = sys.argv[1]
    processes = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        corpus = place / "corpus"
        make_corpus(corpus)
        files = sorted(str(file.relative_to(corpus)) for file in corpus.rglob("*") if file.is_file())
        try:
            run(program, place, corpus, files, processes)
        finally:
            for process in processes:
                process.kill()
    print(f"{len(failures)} failed" if failures else "all the same")
    sys.exit(1 if failures else 0)


def run(program, place, corpus, files, processes):
    code, expected = count(program, plan(place / "local.toml", corpus), {})
    check("local", code == 0 and all(source["tokens"] > 100_000 for source in expected.values()), expected)

    def compare(name, url, environment, more="", list_file=None):
        code, found = count(program, plan(place / f"{name}.toml", url, more, list_file), environment)
        check(name, code == 0 and same(found, expected), found)
        return found if code == 0 else {}

    def through_faults(name, port, url, environment, host=None):
        """`url` and `environment` are functions of the port that the program uses."""
        compare(name, url(port), environment(port))
        faults = Faults(port, host)
        found = compare(f"{name}, with faults", url(faults.port), environment(faults.port))
        failed = sum(source["failed_requests"] for source in found.values())
        all_kinds = all(faults.faults.values())
        check(f"{name}, faults are counted", failed > 0 and all_kinds, f"{failed} failed, faults {faults.faults}")

    curve = keep_run(program, place, "disk", "runs", {})
    check("a run on the disk", isinstance(curve, list) and len(curve) == 13, curve)

    def run_in(name, url, environment):
        found = keep_run(program, place, name, url, environment)
        check(f"a run in {name}", found == curve, found)

    # S3.
    port = free_port()
    (place / "s3").mkdir()
    start(processes, "versitygw", "--access", "reader", "--secret", SECRET, "--port", f"127.0.0.1:{port}", "posix", str(place / "s3"))
    wait_for(port)
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="reader",
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=botocore.config.Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket="corpora")
    for file in files:
        client.upload_file(str(corpus / file), "corpora", f"web/{file}")

    def s3(port):
        return {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT": f"http://127.0.0.1:{port}"}

    through_faults("s3", port, lambda _: "s3://corpora/web", s3)
    run_in("s3", "s3://corpora/runs", s3(port))
    (place / "aws").write_text(f"[lab]\naws_access_key_id = reader\naws_secret_access_key = {SECRET}\n")
    profile = {"AWS_PROFILE": "lab", "AWS_SHARED_CREDENTIALS_FILE": str(place / "aws"), "AWS_ENDPOINT": f"http://127.0.0.1:{port}"}
    compare("s3, credentials of a file", "s3://corpora/web", profile)
    wrong = s3(port) | {"AWS_SECRET_ACCESS_KEY": SECRET + "x"}
    code, message = count(program, plan(place / "wrong.toml", "s3://corpora/web"), wrong)
    check("s3, a wrong key", code not in (0, None) and SECRET not in message and "s3://corpora/web" in message, message)

    # Verified copies through an unreliable network, to a disk and to a store. The second time there is nothing to do.
    faults = Faults(port)
    for name, to in (("a disk", str(place / "copies")), ("s3", "s3://corpora/copies")):
        from_plan = plan(place / "mirror.toml", "s3://corpora/web")
        first, second = (mirror(program, from_plan, to, s3(faults.port)) for _ in range(2))
        size = sum((corpus / file).stat().st_size for file in files)
        check(f"mirror to {name}", first == [len(files), size, 0] and second == [0, 0, len(files)], f"{first} {second}")
    copied = {str(file.relative_to(place / "copies")): file for file in (place / "copies").rglob("*") if file.is_file()}
    kinds = {"jsonl": "lines", "parquet": "parquet", "gz": "gzip"}
    same_bytes = all((corpus / file).read_bytes() == copied[f"{kinds[file.rsplit('.')[-1]]}/{file}"].read_bytes() for file in files)
    check("mirror, the same bytes", same_bytes)
    found = count(program, plan(place / "copies.toml", "s3://corpora/copies", by_name=True), s3(port))[1]
    check("mirror, the same counts", same(found, expected), found)
    (place / "s3/corpora/web" / files[0]).write_bytes(b"")
    client.upload_file(str(corpus / files[0]), "corpora", f"web/{files[0]}")
    body = bytearray((corpus / files[1]).read_bytes())
    body[10] ^= 1
    client.put_object(Bucket="corpora", Key=f"web/{files[1]}", Body=bytes(body))
    again = mirror(program, plan(place / "mirror.toml", "s3://corpora/web"), str(place / "copies"), s3(port))
    check("mirror, a changed file is copied again", again[0] == 1 and again[2] == len(files) - 1, again)
    client.upload_file(str(corpus / files[1]), "corpora", f"web/{files[1]}")
    begun = time.monotonic()
    slow = mirror(program, plan(place / "mirror.toml", "s3://corpora/web"), str(place / "slow"), s3(port), "--rate", "8MB")
    took = time.monotonic() - begun
    check("mirror, the rate is kept", slow[0] == len(files) and took > (size - 20e6) / 8e6, f"{slow} {took}")

    # The cache, first with a limit that is large enough for everything, then with a smaller one.
    cache = place / "cache"
    keep = f'cache = "{cache}"\ncache_limit = "1GiB"\n'
    first = compare("s3, first epoch with a cache", "s3://corpora/web", s3(port), keep)
    second = compare("s3, second epoch with a cache", "s3://corpora/web", s3(port), keep)
    fetched = [sum(source["fetched_bytes"] for source in found.values()) for found in (first, second)]
    cached = sum(source["cached_bytes"] for source in second.values())
    check("s3, the cache saves requests", fetched[1] == 0 and cached >= fetched[0] > 0, f"{fetched} {cached}")
    compare("s3, a small cache", "s3://corpora/web", s3(port), f'cache = "{cache}"\ncache_limit = "4MiB"\n')
    size = sum(file.stat().st_size for file in cache.iterdir())
    check("s3, the limit of the cache holds", size <= (4 << 20) * 17 // 16, f"{size}")

    # Google Cloud Storage.
    port = free_port()
    (place / "gcs").mkdir()
    start(
        processes,
        *["fake-gcs-server", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)],
        *["-filesystem-root", str(place / "gcs"), "-public-host", f"127.0.0.1:{port}"],
    )
    wait_for(port)
    google = google_storage.Client(
        project="lab", credentials=AnonymousCredentials(), client_options={"api_endpoint": f"http://127.0.0.1:{port}"}
    )
    bucket = google.create_bucket("corpora")
    for file in files:
        bucket.blob(f"web/{file}").upload_from_filename(str(corpus / file))

    def gcs(port):
        key = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key)}

    through_faults("gcs", port, lambda _: "gs://corpora/web", gcs, f"127.0.0.1:{port}")

    # Azure Blob Storage.
    port = free_port()
    (place / "azure").mkdir()
    start(
        processes,
        *["azurite-blob", "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port)],
        *["--location", str(place / "azure"), "--skipApiVersionCheck"],
    )
    wait_for(port)
    connection = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURE_KEY};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    container = azure.storage.blob.BlobServiceClient.from_connection_string(connection).create_container("corpora")
    for file in files:
        container.upload_blob(f"web/{file}", (corpus / file).read_bytes())

    def az(port):
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/devstoreaccount1",
        }

    through_faults("azure", port, lambda _: "az://corpora/web", az)
    run_in("azure", "az://corpora/runs", az(port))

    # A web server with a list of its files.
    port = free_port()
    (place / "nginx.conf").write_text(
        f"worker_processes 1; daemon off; pid {place}/nginx.pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log {place}/access.log; client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;\n"
        f"fastcgi_temp_path {place}/fastcgi; uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;\n"
        f"server {{ listen 127.0.0.1:{port}; root {corpus}; }} }}\n"
    )
    # The server's workers must be able to read this user's files.
    start(processes, "nginx", "-c", str(place / "nginx.conf"), "-g", f"user {os.environ.get('USER', 'root')};")
    wait_for(port)
    faults = Faults(port)
    for name, at in (("http", port), ("http, with faults", faults.port)):
        (place / "urls.txt").write_text("# all files\n" + "".join(f"http://127.0.0.1:{at}/{file}\n" for file in files))
        compare(name, f"http://127.0.0.1:{at}", {}, list_file=place / "urls.txt")
    check("http, there were faults", all(faults.faults.values()), faults.faults)

    # The hub.
    hub = Hub(corpus, port)
    official = huggingface_hub.HfApi(endpoint=hub.url, token="hub-token")
    tree = official.list_repo_tree("lab/texts", repo_type="dataset", recursive=True, revision=hub.commit)
    listed = sorted(entry.path for entry in tree if isinstance(entry, huggingface_hub.RepoFile))
    check("hub, the official client lists the same files", listed == files, listed)
    hub.tokens.clear()
    access = place / "access.log"
    before = len(access.read_text().splitlines())
    found = compare("hub", "hf://datasets/lab/texts", {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hub-token"})
    check("hub, its limit is obeyed", hub.refused == 1 and sum(s["failed_requests"] for s in found.values()) == 1, found)
    ranges = len(access.read_text().splitlines()) - before
    check("hub, redirects are remembered", hub.resolved < ranges / 2, f"{hub.resolved} of {ranges}")
    (place / "hub-home").mkdir()
    (place / "hub-home/token").write_text("hub-token\n")
    compare("hub, a revision and a stored token", "hf://datasets/lab/texts@v1", {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hub-home")})
    code, message = count(program, plan(place / "none.toml", "hf://datasets/lab/texts"), {"HF_ENDPOINT": hub.url})
    check("hub, without a token", code == 2 and "HF_TOKEN" in message, message)
    # A proxy records what the server of the contents is sent.
    watched = Faults(port)
    watched.requests = -(10**6)
    hub.contents_port = watched.port
    compare("hub, contents from elsewhere", "hf://datasets/lab/texts@main", {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hub-token"})
    check("hub, the token stays with the hub", watched.heads and not any(b"hub-token" in head for head in watched.heads))


main()
