"""The folder in which the documentation's commands run: photos by class, and some single files."""

from pathlib import Path

from beton_files import photo

IMAGES = {"train": {"ant": 8, "bee": 7, "cats": 5}, "val": {"ant": 3, "bee": 3, "cats": 3}}


def write_workspace(root: Path) -> None:
    """photos/{train,val}/<class>/*.jpg and the other files that the pages name."""
    for split, classes in IMAGES.items():
        for name, count in classes.items():
            write_images(root / "photos" / split / name, range(count))
    write_images(root / "photos/train/cats", [17])
    write_images(root / "more-photos/cats", [1, 2])
    for name, count in IMAGES["val"].items():
        write_images(root / "test-photos" / name, range(10, 10 + count))
    for name in ("cat.jpg", "a.jpg", "b.png"):
        photo(40, 30).save(root / name)
    (root / "gone.txt").write_text("ant/0.jpg\n")


def write_images(folder: Path, numbers) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        photo(48 + 5 * number, 36 + number).save(folder / f"{number}.jpg")
