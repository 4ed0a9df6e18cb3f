"""TensorBoard's tab HParams has the keys that members change, and their metrics."""

import math

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from dpojax import storage
from dpojax.sweeps.hparams import FOLDER, write_hparams

START = "_hparams_/session_start_info"


def events(folder):
    """The events of the one file in a folder, as TFRecords hold them."""
    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:  # length (8 bytes), its checksum (4), payload, checksum (4)
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def read(folder):
    """The keys of a member, and its metrics, by name."""
    keys, metrics = {}, {}
    for event in events(folder):
        for value in event.summary.value:
            if value.tag == START:
                data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for key, x in data.session_start_info.hparams.items():
                    keys[key] = getattr(x, x.WhichOneof("kind"))
            elif not value.tag.startswith("_hparams_"):
                metrics[value.tag] = (event.step, value.simple_value)
    return keys, metrics


def test_each_member_has_its_keys_and_the_metrics_of_its_kept_step(tmp_path):
    members = {
        "a": {"preference.beta": 0.5, "preference.loss": "dpo"},
        "b": {"preference.beta": 1.0, "preference.loss": "ipo", "sft.lora.targets": ("x", "y")},
    }
    line = {"step": 7, "time": 1.0, "split": "eval", "loss": 0.25, "kl": math.nan}
    for _ in range(2):  # the second time in place of the first
        write_hparams(storage.as_path(tmp_path), members, {"a": line})
    keys, metrics = read(tmp_path / FOLDER / "a")
    assert keys == {"preference.beta": 0.5, "preference.loss": "dpo", "sft.lora.targets": ""}
    assert metrics == {"eval/loss": (7, 0.25)}
    keys, metrics = read(tmp_path / FOLDER / "b")
    assert keys["sft.lora.targets"] == "x,y"
    assert metrics == {}  # it is not finished
