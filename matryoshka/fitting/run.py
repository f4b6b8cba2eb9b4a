"""The steps of a fit, from photos to report; each is skipped if its output is there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka import distributed
from matryoshka.data import survey
from matryoshka.data.photos import (
    Found,
    LeftOut,
    PhotoError,
    Photos,
    count_reasons,
    find_photos,
    split,
)
from matryoshka.data.survey import Looked
from matryoshka.data.writer import write_beton
from matryoshka.files import write_atomically
from matryoshka.fitting import summary
from matryoshka.fitting.choices import Stored, choose, start_weights
from matryoshka.fitting.output import Progress, bar
from matryoshka.training import recipe
from matryoshka.training.progress import duration

STATE = "fit.json"  # options, choices and times; marks a folder as made by fit
IMAGES = "images.json"  # what was found and what was left out
MODEL = "model.safetensors"
PARTS = ("train", "val", "test")
VERSION = 1
LOOK_SHARE = 0.15  # of the time, at most, to look at the photos
MOST_VALIDATED = 5000  # images of a validation part that is cut off here


@dataclass
class Run:
    """One fit, from its photos to its report; each step is skipped if its output is there."""

    folder: Path
    root: Path
    settings: dict[str, Any]
    progress: Progress
    state: dict[str, Any] = field(default_factory=dict)

    def all(self) -> tuple[dict[int, dict[str, float]], int]:
        progress = self.progress
        progress.stage("looking for photos")
        found = find_photos(self.root, self.settings["labels"])
        check_classes(found, self.root)
        self.open(found)
        if "images" not in self.state:
            self.prepare(found)
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

    def open(self, found: Found) -> None:
        """Make the folder, or read the state of the run that is in it."""
        self.state = {"version": VERSION, **self.settings, "files": fingerprint(found)}
        path = self.folder / STATE
        if path.exists():
            self.state = read_state(path, self.state)
        else:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise PhotoError(
                    f"--output {self.folder}: exists and was not made by fit; give another folder"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self.save()
        self.progress.open_log(self.folder / "fit.log")

    def save(self) -> None:
        content = json.dumps(self.state, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / STATE, content.encode(errors="surrogateescape"))

    def data(self, part: str) -> str:
        return str(self.folder / "data" / f"{part}.beton")

    # -- photos

    def prepare(self, found: Found) -> None:
        """Look at the photos, split them, and write the parts as .beton files."""
        progress = self.progress
        parts, left_out, warnings, facts = self.look(found)
        self.check_disk(parts, facts["stored"])
        progress.stage("writing data/")
        (self.folder / "data").mkdir(exist_ok=True)
        for name, photos in parts.items():
            manifest = write_beton(
                photos,
                self.data(name),
                max_resolution=facts["stored"],
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
        reasons = count_reasons(left_out)
        report = {
            "classes": parts["train"].classes,
            "counts": {name: photos.counts().tolist() for name, photos in parts.items()},
            "left_out": reasons,
            "files_left_out": [file._asdict() for file in left_out],
        }
        content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / IMAGES, content.encode(errors="surrogateescape"))
        sizes = {name: len(photos) for name, photos in parts.items()}
        self.state["images"] = {**facts, **sizes, "warnings": warnings, "left_out": reasons}
        self.save()

    def look(
        self, found: Found
    ) -> tuple[dict[str, Photos], list[LeftOut], list[str], dict[str, Any]]:
        """(photos of the parts, files left out, warnings, facts): each photo is decoded once."""
        progress = self.progress
        total = sum(map(len, found.parts().values()))
        progress.line("photos", f"{total:,} images in {self.root}")
        progress.stage("looking at the photos")
        left_out = list(found.left_out)
        warnings = list(found.notes)
        looked: dict[str, tuple[Photos, Looked]] = {}
        for name, photos in found.parts().items():
            share = LOOK_SHARE * len(photos) / total
            with bar(len(photos), "looking") as update:
                seen = survey.look(
                    photos,
                    update,
                    seconds=share * progress.seconds,
                    seed=self.settings["seed"],
                )
            left_out += [
                LeftOut(photos.name(row), f"unreadable: {reason}")
                for row, reason in seen.problems.items()
            ]
            reached = int(seen.readable.sum()) + len(seen.problems)
            if reached < len(photos):
                warnings.append(
                    f"{name}: there is time for {reached:,} of {len(photos):,} images, chosen at "
                    "random; more --minutes use more of them"
                )
            # A copy within a part counts once.
            copies = survey.exact_copies(seen)
            warnings += survey.label_conflicts(photos, copies)
            left_out += [
                LeftOut(photos.name(c.row), f"copy of another image ({photos.name(c.of)})")
                for c in copies
            ]
            keep = seen.readable.copy()
            keep[[copy.row for copy in copies]] = False
            rows = np.flatnonzero(keep)
            if not len(rows):
                raise PhotoError(no_image(self.root, name, len(photos), seen))
            looked[name] = photos.take(rows), seen.take(rows)

        train, seen = looked["train"]
        if "val" not in looked:
            groups = survey.near_groups(seen)
            kept, cut = split(
                train, share=self.settings["val_share"], seed=self.settings["seed"], together=groups
            )
            cut = cut[np.random.default_rng(self.settings["seed"]).permutation(len(cut))]
            kept = np.sort(np.concatenate((kept, cut[MOST_VALIDATED:])))
            cut = np.sort(cut[:MOST_VALIDATED])
            if not len(cut):
                raise PhotoError(
                    f"{self.root}: no class has two different images, so none can be kept for "
                    "validation; add images, or give --labels FILE with fewer classes"
                )
            near = int((np.bincount(groups)[groups] > 1).sum())
            if near:
                warnings.append(
                    f"{near:,} images have near duplicates; they are all used to train, none to "
                    "validate"
                )
            looked["train"] = train.take(kept), seen.take(kept)
            looked["val"] = train.take(cut), seen.take(cut)
        else:
            warnings += survey.overlap_warnings(looked)

        parts = {name: photos for name, (photos, _) in looked.items()}
        warnings += survey.class_warnings(parts["train"])
        side = int(np.median(np.minimum(seen.width, seen.height)))
        longest = int(np.maximum(seen.width, seen.height).max())
        counts = parts["train"].counts()
        progress.line(
            "found",
            f"{len(parts['train']):,} to train, {len(parts['val']):,} to validate"
            + (f", {len(parts['test']):,} to test" if "test" in parts else "")
            + f"; {len(counts)} classes of {number_range(counts)}; shorter side {side} px",
        )
        for line in left_out_lines(left_out):
            progress.line("left out", line)
        # Twice the resolution, so that a random crop is not enlarged.
        stored = min(longest, max(256, 2 * recipe.resolutions(side)[0]))
        return parts, left_out, warnings, {"side": side, "stored": stored, "classes": len(counts)}

    def check_disk(self, parts: Mapping[str, Photos], stored: int) -> None:
        """PhotoError if the outputs will not fit on the disk."""
        images = sum(map(len, parts.values()))
        # A JPEG of quality 90 has about 0.4 bytes per pixel; embeddings twice; models, checkpoints.
        needed = images * (0.4 * 0.75 * stored**2 + 2 * 4 * 2048) + 1e9
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
        if (self.folder / MODEL).exists():
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
        model = ["--path", str(self.folder / MODEL), "--device", self.settings["device"]]
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
            words = ["--path", str(self.folder / MODEL), "--data", self.data(part)]
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
            words = ["--path", str(self.folder / MODEL), "--data", self.data("val")]
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
        results = json.loads((self.folder / "results.json").read_text())
        prefixes = {int(dim): row for dim, row in results["prefixes"].items()}
        progress.print("")
        progress.print(
            f"Accuracy on {results['images']:,} photos that were not trained on (95 % interval):"
        )
        for line in summary.prefix_table(prefixes, results["images"]):
            progress.print(line)
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


def number_range(counts: np.ndarray) -> str:
    """`500`, or `3 to 40` images."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def left_out_lines(left_out: list[LeftOut]) -> list[str]:
    """Numbers of files by kind of reason; for reasons that differ by file, with an example."""
    by_kind: dict[str, list[LeftOut]] = {}
    for file in left_out:
        kind = file.reason
        for several in ("unreadable", "copy of another image"):
            if kind.startswith(several):
                kind = several
        by_kind.setdefault(kind, []).append(file)
    lines = []
    for kind, files in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        first = files[0]
        example = "" if first.reason == kind else f", such as {first.name}: {first.reason}"
        example = example.replace(f"{kind}: ", "")
        lines.append(f"{len(files):,} files: {kind}{example}")
    return lines


def check_classes(found: Found, root: Path) -> None:
    """PhotoError if there is nothing to learn, or nothing to validate on."""
    train = found.train
    counts = train.counts()
    if len(train.classes) < 2:
        raise PhotoError(
            f"{root}: has one class only ({train.classes[0]}), and nothing to tell it from; add a "
            "folder for a second class"
        )
    if found.val is None and counts.max() < 2:
        raise PhotoError(
            f"{root}: each of {len(counts)} classes has one image, so none can be kept for "
            "validation; add images, or give --labels FILE with fewer classes"
        )


def no_image(root: Path, part: str, count: int, seen: Looked) -> str:
    if not seen.problems:
        return f"{root}: {part}: no image could be read in the time; give more --minutes"
    row, reason = next(iter(seen.problems.items()))
    return f"{root}: none of {count} images of {part} can be read (number {row + 1}: {reason})"


def fingerprint(found: Found) -> str:
    """Changes when files are added, removed or have another size."""
    digest = hashlib.sha256()
    for part, photos in found.parts().items():
        digest.update(part.encode())
        for row, name in enumerate(photos.names):
            size = photos.path(row).stat().st_size if photos.path(row).exists() else -1
            label = photos.classes[photos.labels[row]]
            digest.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def read_state(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an earlier start. PhotoError if it had other options or photos."""
    try:
        state = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError:
        raise PhotoError(f"{path}: damaged: not valid JSON; remove its folder") from None
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
