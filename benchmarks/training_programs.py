"""Public training programs that run on a CPU, each with data that is made here.

Their code is not kept here and never downloaded: some are found in checkouts of their repositories,
others come inside a package. Each runs as it is, with the options that its command line has.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.cases import Unavailable

_BARS = r"^.*\d+%\|.*$"  # of tqdm
_IMPORT = re.compile(r"^from torch\.utils\.data(\.dataloader)? import DataLoader$", re.MULTILINE)
_OURS = "from safeloader import SafeDataLoader as DataLoader"


@dataclass(frozen=True)
class Program:
    """A program, and how it is run."""

    name: str
    loader: str
    """How it uses DataLoader."""
    modules: tuple[str, ...]
    """What it imports besides torch; the distributions have the same names."""
    make_data: Callable[[Path], None]
    """Writes what it reads into an empty folder."""
    command: Callable[[Path, Path], list[str]]
    """What stands behind `python`, or a program's path, given the checkout and the data."""
    varies: str
    """What differs in its output from run to run: a regular expression."""
    checkout: str | None = None
    """The folder of its checkout; None if it comes inside a package."""
    on_path: bool = False
    """Whether its checkout has to be on Python's path."""
    imports: tuple[str, ...] = ()
    """Files of the checkout that import DataLoader by one line, which can be swapped."""
    environment: dict[str, str] = field(default_factory=dict)
    """`DATA` in a value stands for the folder of the data."""

    def found_in(self, folder: Path | None) -> Path:
        """Its checkout, or a folder without meaning where it has none.

        Raises:
            Unavailable: if it cannot be run here; the text says what is missing.
        """
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                raise Unavailable(f"{module} is not installed")
        if self.checkout is None:
            return Path(sys.prefix)
        if folder is None:
            raise Unavailable(f"a checkout {self.checkout} is needed: --programs DIR")
        if not (folder / self.checkout).is_dir():
            raise Unavailable(f"there is no checkout {self.checkout} in {folder}")
        return (folder / self.checkout).resolve()

    def swapped(self, checkout: Path, copy: Path) -> None:
        """Copy the checkout, with the import of DataLoader replaced and nothing else.

        Raises:
            ValueError: if a file does not have that import exactly once.
        """
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        for name in self.imports:
            text, count = _IMPORT.subn(_OURS, (copy / name).read_text("utf-8"))
            if count != 1:
                raise ValueError(f"{name} has {count} lines that import DataLoader, and not one")
            (copy / name).write_text(text, "utf-8")


def _installed(script: str) -> str:
    """A program that a package installs, of this Python's and no other environment."""
    found = shutil.which(script, path=str(Path(sys.executable).parent))
    if found is None:
        raise Unavailable(f"there is no program {script} beside {sys.executable}")
    return found


# minGPT ───────────────────────────────────────────────────────────────────────────────────────


def _no_data(folder: Path) -> None:
    """It makes its own."""


def _mingpt(checkout: Path, data: Path) -> list[str]:
    return [
        str(checkout / "projects" / "adder" / "adder.py"),
        *("--data.ndigit=1", "--trainer.max_iters=501", "--trainer.num_workers=2"),
        "--system.work_dir=out",
    ]


# timm ─────────────────────────────────────────────────────────────────────────────────────────


def _image_folders(folder: Path) -> None:
    """Images of noise in two classes."""
    from PIL import Image

    draw = np.random.default_rng(1)
    for split, count in (("train", 96), ("val", 32)):
        for kind in ("one", "two"):
            where = folder / split / kind
            where.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{number:03}.png")


def _timm(checkout: Path, data: Path) -> list[str]:
    return [
        *(str(checkout / "train.py"), "--data-dir", str(data), "--device", "cpu", "--seed", "1"),
        *("--model", "resnet10t", "--num-classes", "2", "--img-size", "64", "--epochs", "2"),
        *("--warmup-epochs", "0", "--batch-size", "16", "--workers", "2", "--log-interval", "2"),
        *("--use-multi-epochs-loader", "--output", "out", "--experiment", "one"),
    ]


# ultralytics ──────────────────────────────────────────────────────────────────────────────────


def _detection_folders(folder: Path) -> None:
    """A bright square on noise in each image, and the font it would download otherwise."""
    from PIL import Image

    draw = np.random.default_rng(1)
    for split, count in (("train", 64), ("val", 16)):
        for what in ("images", "labels"):
            (folder / what / split).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 128, (64, 64, 3), dtype=np.uint8)
            left, top = draw.integers(0, 40, 2)
            pixels[top : top + 24, left : left + 24] = 255
            Image.fromarray(pixels).save(folder / "images" / split / f"{number:03}.png")
            box = f"0 {(left + 12) / 64} {(top + 12) / 64} 0.375 0.375\n"
            (folder / "labels" / split / f"{number:03}.txt").write_text(box)
    described = f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n  0: square\n"
    (folder / "data.yaml").write_text(described)
    fonts = importlib.util.find_spec("matplotlib")
    if fonts is None or not fonts.submodule_search_locations:
        raise Unavailable("matplotlib is not installed; its font is needed")
    font = Path(fonts.submodule_search_locations[0], "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
    shutil.copy(font, folder / "Arial.ttf")


def _ultralytics(checkout: Path, data: Path) -> list[str]:
    options = {
        "model": "yolo11n.yaml",  # from scratch: without weights
        "data": data / "data.yaml",
        "epochs": 3,
        "imgsz": 64,
        "batch": 8,
        "device": "cpu",
        "pretrained": False,
        "plots": False,
        "amp": False,
        "seed": 1,
        "project": "out",
        "name": "one",
    }
    words = [f"{name}={value}" for name, value in options.items()]
    return [_installed("yolo"), "detect", "train", *words]


# TRL ──────────────────────────────────────────────────────────────────────────────────────────


def _texts(folder: Path) -> None:
    """Four hundred lines of sixty words, a tokenizer of these words, and a small GPT-2."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    draw = random.Random(1)
    words = [f"w{number}" for number in range(60)]
    (folder / "texts").mkdir()
    with open(folder / "texts" / "train.jsonl", "w", encoding="utf-8") as file:
        for _ in range(400):
            text = " ".join(draw.choices(words, k=draw.randrange(8, 40)))
            file.write(json.dumps({"text": text}) + "\n")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.save_pretrained(folder / "model")
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **shape, **numbers))
    model.save_pretrained(folder / "model")


def _sft(checkout: Path, data: Path) -> list[str]:
    return [
        *(_installed("trl"), "sft", "--num_processes", "1", "--use_cpu", "--bf16", "false"),
        *("--model_name_or_path", str(data / "model"), "--dataset_name", str(data / "texts")),
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--seed", "1"),
        *("--dataloader_num_workers", "2", "--logging_steps", "10", "--disable_tqdm", "true"),
        *("--report_to", "none", "--save_strategy", "no", "--output_dir", "out"),
    ]


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program(
            name="mingpt",
            loader="plain; a sampler with replacement, and an epoch that never ends",
            modules=(),
            make_data=_no_data,
            command=_mingpt,
            varies=r"iter_dt [\d.]+ms",
            checkout="minGPT",
            on_path=True,
            imports=("mingpt/trainer.py", "projects/adder/adder.py"),
        ),
        Program(
            name="timm",
            loader="a subclass of the library, whose inner iterator is endless",
            modules=("torchvision", "yaml", "safetensors", "huggingface_hub"),
            make_data=_image_folders,
            command=_timm,
            varies=r"(Time|Data): +[\d.]+s?( \([\d.]+\))?"
            r"(, +[\d.]+/s +\([\d.]+s, +[\d.]+/s\))?",
            checkout="pytorch-image-models",
        ),
        Program(
            name="ultralytics",
            loader="a subclass of the library, which restarts itself; no workers on a CPU",
            modules=("torchvision", "ultralytics"),
            make_data=_detection_folders,
            command=_ultralytics,
            varies=r"^.*(?<!\d)\d{1,2}% [━─╸╺]+.*$|[━─╸╺]+ .*$|Fast image access.*|Speed: .*"
            r"|completed in .*|^.*New cache created.*$",
            environment={
                "YOLO_CONFIG_DIR": "DATA",
                "YOLO_OFFLINE": "true",
                "YOLO_AUTOINSTALL": "false",
            },
        ),
        Program(
            name="sft",
            loader="made again by a framework (Trainer, Accelerate), in a child of a launcher",
            modules=("trl", "transformers", "accelerate", "datasets"),
            make_data=_texts,
            command=_sft,
            varies=rf"{_BARS}|'train_(runtime|\w+_per_second)': '[^']*'",
            environment={
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": "DATA",
                "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
        ),
    )
}
