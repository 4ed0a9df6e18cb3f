"""A file of examples, written whole or not at all as the token cache does."""

from dpojax import storage
from dpojax.data.examples import FileStore


def save(path, examples, about, held_out=None):
    """Write a file that holds the examples, some of them held out, and `about`."""
    with storage.replacing(path) as unfinished:
        store = FileStore(unfinished)
        store.add(examples, held_out=False)
        if held_out is not None:
            store.add(held_out, held_out=True)
        store.finish()
        store.seal(about)
