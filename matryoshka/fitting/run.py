"""The steps of a fit, from photos to report; each is skipped if its output is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka import devices, distributed, json_files
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.data.photos import Found, PhotoError, count_reasons, find_photos
from matryoshka.data.writer import write_beton
from matryoshka.files import read_regular, write_atomically
from matryoshka.fitting import STATE, summary
from matryoshka.fitting.choices import Stored, choose, start_weights
from matryoshka.fitting.looking import Photographed, check_classes, fingerprint, look
from matryoshka.fitting.output import Progress
from matryoshka.report.tables import accuracy_table
from matryoshka.training import recipe
from matryoshka.training.progress import duration
from matryoshka.training.run_lock import RunLock, is_unused

LOCK = "fit.lock"  # not that of the training, which takes its own inside a fit
IMAGES = "images.json"  # what was found and what was left out
PARTS = ("train", "val", "test")
VERSION = 1


@dataclass
class Run:
    """One fit, from its photos to its report; each step is skipped if its output is there."""

    folder: Path
    root: Path
    settings: dict[str, Any]
    progress: Progress
    held: ExitStack  # receives the lock of the folder
    state: dict[str, Any] = field(default_factory=dict)

    def all(self) -> tuple[dict[int, dict[str, float]], int]:
        progress = self.progress
        progress.stage("looking for photos")
        found = find_photos(self.root, self.settings["labels"])
        check_classes(found.train, is_split=found.val is not None, root=self.root)
        is_new = self.open(found)
        if "images" not in self.state:
            try:
                self.prepare(found)
            except PhotoError:
                if is_new:  # nothing of a run that cannot start is left
                    self.remove()
                raise
        if "choices" not in self.state:
            self.choose()
        for warning in self.state["images"]["warnings"]:
            progress.line("warning", warning)
        self.show_choices()
        self.train()
        self.evaluate()
        self.index()
        self.write_report()
        return self.finish()

    # -- state

    def open(self, found: Found) -> bool:
        """Make the folder, or read the state of the run that is in it; whether it is new."""
        self.state = {"version": VERSION, **self.settings, "files": fingerprint(found)}
        path = self.folder / STATE
        if not path.exists() and not is_unused(self.folder):
            raise PhotoError(
                f"--output {self.folder}: exists and was not made by fit; give another folder"
            )
        self.held.enter_context(
            RunLock(self.folder, LOCK, remedy="wait for its end, or give another --output")
        )
        is_new = not path.exists()
        if is_new:
            self.save()
        else:
            self.state = read_state(path, self.state)
        self.progress.open_log(self.folder / "fit.log")
        return is_new

    def remove(self) -> None:
        """Delete the folder of a run whose photos cannot be used."""
        self.progress.close_log()
        shutil.rmtree(self.folder)

    def save(self) -> None:
        write_atomically(self.folder / STATE, json_files.encode(self.state))

    def data(self, part: str) -> str:
        return str(self.folder / "data" / f"{part}.beton")

    # -- photos

    def prepare(self, found: Found) -> None:
        """Look at the photos, split them, and write the parts as .beton files."""
        progress = self.progress
        seen = look(
            found,
            self.root,
            progress,
            val_share=self.settings["val_share"],
            seed=self.settings["seed"],
        )
        self.check_disk(seen)
        progress.stage("writing data/")
        (self.folder / "data").mkdir(exist_ok=True)
        warnings = list(seen.warnings)
        for name, photos in seen.parts.items():
            manifest = write_beton(
                photos,
                self.data(name),
                max_resolution=seen.longest,
                write_mode="jpg",
                transcode="fit",
                exif_rotate=True,
                names=True,
            )
            # Files that went away or changed since they were looked at.
            gone = manifest.get("broken", [])
            if gone:
                warnings.append(
                    f"{len(gone)} images of {name} changed while they were read; left out "
                    f"({gone[0]['name']}: {gone[0]['reason']})"
                )
        reasons = count_reasons(seen.left_out)
        classes = seen.parts["train"].classes
        report = {
            "classes": classes,
            "counts": {name: photos.counts().tolist() for name, photos in seen.parts.items()},
            "left_out": reasons,
            "files_left_out": [file._asdict() for file in seen.left_out],
        }
        content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / IMAGES, content.encode(errors="surrogateescape"))
        self.state["images"] = {
            "side": seen.side,
            "stored": seen.longest,
            "classes": len(classes),
            **{name: len(photos) for name, photos in seen.parts.items()},
            "warnings": warnings,
            "left_out": reasons,
        }
        self.save()

    def check_disk(self, seen: Photographed) -> None:
        """PhotoError if the outputs will not fit on the disk."""
        images = sum(map(len, seen.parts.values()))
        # A JPEG of quality 90 has about 0.4 bytes per pixel; embeddings twice; models, checkpoints.
        needed = images * (0.4 * 0.75 * seen.longest**2 + 2 * 4 * 2048) + 1e9
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise PhotoError(
                f"--output {self.folder}: needs about {needed / 1e9:.1f} GB, the disk has "
                f"{free / 1e9:.1f} GB free; give a folder on another disk"
            )

    # -- choices

    def choose(self) -> None:
        """Choose the options of the training and write them down."""
        progress = self.progress
        images = self.state["images"]
        given = self.settings["options"]
        device = distributed.pick_device(self.settings["device"], 0)
        devices.choose_kernels(device)
        progress.stage("looking for published weights")
        init, start = start_weights(given, side=images["side"], gpu=device.type == "cuda")
        progress.stage("timing some steps")
        parts = [part for part in PARTS if part in images]
        stored = Stored(
            images={part: images[part] for part in parts},
            side=images["side"],
            longest=images["stored"],
            classes=images["classes"],
            files={part: self.data(part) for part in parts},
        )
        choice = choose(
            stored,
            given,
            device=device,
            seconds_left=lambda: progress.seconds - progress.elapsed(),
            init=init,
            start=start,
        )
        images["warnings"] += choice.warnings
        # Tuples become lists, as they are when the state is read again.
        self.state["choices"] = json.loads(json.dumps(choice.options))
        self.state["start"] = choice.start
        self.state["training_seconds"] = round(choice.expected, 1)
        self.save()

    def show_choices(self) -> None:
        progress = self.progress
        chosen = self.state["choices"]
        images = self.state["images"]
        epochs = chosen["training.epochs"]
        low, high = chosen["resolution.min_res"], chosen["resolution.max_res"]
        ramp = "" if low == high else f", {low} px in the first half of the run"
        progress.line("size", f"{high} px{ramp} (the photos' shorter side: {images['side']} px)")
        progress.line("model", f"{chosen['model.arch']}, {self.state['start']}")
        progress.line(
            "training",
            f"{epochs} {'epoch' if epochs == 1 else 'epochs'} of {images['train']:,} images, "
            f"batches of {chosen['training.batch_size']}, peak rate {chosen['lr.lr']:g}; about "
            f"{duration(self.state['training_seconds'])} of "
            f"{self.settings['minutes']:g} min",
        )
        progress.line(
            "outputs", f"{self.folder}/ (config.yaml has all options, for matryoshka train)"
        )

    # -- programs

    def train(self) -> None:
        if (self.folder / FINAL).exists():
            return
        self.progress.stage("training")
        words = recipe.flags(self.state["choices"])
        words += [
            f"--data.train_dataset={self.data('train')}",
            f"--data.val_dataset={self.data('val')}",
            f"--logging.folder={self.folder.parent}",
            f"--logging.run_id={self.folder.name}",
            f"--training.seed={self.settings['seed']}",
            f"--training.device={self.settings['device']}",
            "--training.keep_last=1",
            "--training.resume=auto",
        ]
        self.progress.call("train.train_imagenet", words, show=True)

    def evaluate(self) -> None:
        """results.json, analysis.json, and test.json if there is a test part."""
        model = ["--path", str(self.folder / FINAL), "--device", self.settings["device"]]
        results = self.folder / "results.json"
        if not results.exists():
            self.progress.stage("evaluating every prefix")
            words = [*model, "--data-root", self.data("val"), "--output", str(results)]
            self.progress.call(
                "inference.pytorch_inference", [*words, "--save_logits", "--save_gt"]
            )
        test = self.folder / "test.json"
        if "test" in self.state["images"] and not test.exists():
            words = [*model, "--data-root", self.data("test"), "--output", str(test)]
            self.progress.call("inference.pytorch_inference", words)
        if not (self.folder / "analysis.json").exists():
            self.progress.stage("analysing the predictions")
            self.progress.call("inference.analyze", ["--results", str(results)])

    def index(self) -> None:
        """embeddings/ and index/ of all photos."""
        index = self.folder / "index"
        parts = [part for part in PARTS if part in self.state["images"]]
        for part in parts:
            output = self.folder / "embeddings" / part
            if "embedded" in self.state and part in self.state["embedded"]:
                continue
            self.progress.stage("embedding the photos")
            words = ["--path", str(self.folder / FINAL), "--data", self.data(part)]
            words += ["--device", self.settings["device"], "--output", str(output)]
            self.progress.call("inference.embed", words)
            self.state["embedded"] = [*self.state.get("embedded", []), part]
            self.save()
        if self.state.get("indexed"):
            return
        self.progress.stage("building the index")
        shutil.rmtree(index, ignore_errors=True)  # of an interrupted run
        for part in parts:
            action = "build" if part == "train" else "add"
            words = [action, str(index), "--embeddings", str(self.folder / "embeddings" / part)]
            self.progress.call("inference.index", words)
        if len(parts) > 1:
            self.progress.call("inference.index", ["compact", str(index)])
        self.state["indexed"] = True
        self.save()

    def write_report(self) -> None:
        if (self.folder / "report.html").exists():
            return
        progress = self.progress
        maps = self.folder / "gradcam"
        # Pictures are the first thing to leave out when the machine was slower than measured.
        if progress.elapsed() < 1.05 * progress.seconds and not maps.exists():
            progress.stage("drawing Grad-CAM maps")
            words = ["--path", str(self.folder / FINAL), "--data", self.data("val")]
            words += ["--output", str(maps), "--images", "4", "--device", self.settings["device"]]
            progress.call("inference.gradcam", words)
        progress.stage("writing the report")
        words = ["--run", str(self.folder), f"--title={self.root.resolve().name}"]
        if (self.folder / "test.json").exists():
            words += [
                "--results",
                str(self.folder / "results.json"),
                str(self.folder / "test.json"),
            ]
        progress.call("inference.report", words)

    # -- end

    def finish(self) -> tuple[dict[int, dict[str, float]], int]:
        """Print the end; ({prefix: accuracy}, images that it was measured on)."""
        progress = self.progress
        progress.stage("")
        results = json.loads(read_regular(self.folder / "results.json"))
        prefixes = {int(dim): row for dim, row in results["prefixes"].items()}
        progress.print("")
        progress.print(
            f"Accuracy on {results['images']:,} photos that were not trained on (95 % interval):"
        )
        for line in accuracy_table(prefixes, results["images"]).splitlines():
            progress.print(f"  {line}")
        progress.print("")
        progress.print(summary.search_example(self.folder))
        progress.print(self.advice(results))
        if "seconds" not in self.state:
            self.state["seconds"] = round(progress.elapsed(), 1)
            self.save()
        progress.print("")
        for line in summary.next_commands(self.root, self.folder, self.settings):
            progress.print(line)
        progress.print(f"report   {self.folder / 'report.html'}")
        progress.print(f"done     in {duration(progress.elapsed())}")
        return prefixes, results["images"]

    def advice(self, results: Mapping[str, Any]) -> str:
        """What more time would probably bring, from the accuracy on the photos trained on."""
        dim = max(map(int, results["prefixes"]))
        new = results["prefixes"][str(dim)]["top1"]
        known = summary.train_accuracy(self.folder, self.state["images"]["train"])
        epochs = self.state["choices"]["training.epochs"]
        return summary.time_advice(known=known, new=new, epochs=epochs)


def read_state(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an earlier start. PhotoError if it had other options or photos."""
    try:
        state, _ = json_files.decode(read_regular(path))
    except json_files.JsonFileError as error:
        raise PhotoError(f"{path}: damaged: {error}; otherwise remove its folder") from None
    if "images" not in state:  # a start that did not get beyond its photos
        return dict(asked)
    different = []
    for name, value in asked.items():
        before = state.get(name)
        if before != value and name == "files":
            different.append("the files of the photos have changed")
        elif before != value:
            different.append(f"{name} was {before}, now {value}")
    if different:
        raise PhotoError(
            f"{path.parent}: was made with other options ({'; '.join(different)}); give another "
            "--output, or the same options to resume"
        )
    return state
