"""The files of its base model that a run keeps in its workdir, so that it needs the base no more.

A base is config.json, the tokenizer, the generation config, and the PEFT adapters that stages start
from. Its weights are not among them: a run that has begun has its own.
"""

from __future__ import annotations

import shutil

from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import TRAINED_HERE
from dpojax.config.resolved import editable
from dpojax.models import huggingface, lora_peft
from dpojax.stages.setup import Setup
from dpojax.stages.tokenizers import read_generation_config

FOLDER = "base"  # of the workdir


def keep_base_files(setup: Setup) -> None:
    """Copy the base's files into the workdir, unless they are there; by the first process."""
    config, folder = setup.config, setup.workdir / FOLDER
    if not _names_a_folder(config):
        return

    def keep() -> None:
        if folder.exists():
            return
        with storage.replacing_folder(folder) as unfinished:
            generation_config = read_generation_config(config.model.path)
            if generation_config is not None:
                generation_config.save_pretrained(unfinished)
            for stage, source in _adapter_folders(config).items():
                files = storage.local_copy(storage.as_path(source), lora_peft.FILES)
                (unfinished / stage).mkdir()
                for name in lora_peft.FILES:
                    shutil.copyfile(files / name, unfinished / stage / name)
            huggingface.save_tokenizer(setup.tokenizer, unfinished)
            if setup.imported_config is not None:
                storage.write_json(unfinished / "config.json", setup.imported_config)

    sharding.on_first_process(keep)


def with_base_files(config: ConfigDict, workdir: storage.Path, base: str = "") -> ConfigDict:
    """The config of a run that reads its base in the workdir, where it kept one.

    Args:
      base: a folder or hub name to read it from where the run kept none.
    """
    config, folder = editable(config), workdir / FOLDER
    if folder.is_dir():
        config.tokenizer, config.chat_template = str(folder), ""
        config.model.path = config.model.path and str(folder)
        for stage in _adapter_folders(config):
            config[stage].lora.adapters = str(folder / stage)
    elif base:
        config.model.path = base
    return config


def _names_a_folder(config: ConfigDict) -> bool:
    made_here = config.tokenizer.startswith(TRAINED_HERE)
    return bool(config.model.path or (config.tokenizer and not made_here))


def _adapter_folders(config: ConfigDict) -> dict[str, str]:
    """The PEFT folders that stages of the run start from, by stage."""
    stages = {name: config[name] for name in config.stages}
    return {
        name: stage.lora.adapters
        for name, stage in stages.items()
        if "lora" in stage and stage.lora.adapters
    }
