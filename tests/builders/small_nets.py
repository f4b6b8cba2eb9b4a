"""Options that make every net for small images small, and its tests quick."""

VIT = {"image_size": 8, "patch": 4, "dim": 16, "depth": 2, "heads": 2, "dropout": 0}
# Dropout off: a step must lower the loss.
TINY = {
    "vit": VIT,
    "vit_small": VIT,
    "vit_tiny": VIT,
    "simplevit": VIT,
    "dyt": VIT,
    "vitfixedpos": VIT,
    "vitlearnedpos": VIT,
    "vitfixedposdualpatchnorm": VIT,
    "vitfixedposvqvae": VIT,
    "cct": {
        "image_size": 8,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "attention_dropout": 0,
        "drop_path": 0,
    },
    "cait": VIT | {"cls_depth": 1, "drop_path": 0},
    "cait_small": VIT | {"cls_depth": 1, "drop_path": 0},
    "swin": {"image_size": 8, "patch": 2, "dim": 32},
    "mlpmixer": {"image_size": 8, "patch": 4, "dim": 16, "depth": 2},
    "convmixer": {"image_size": 8, "dim": 16, "depth": 2, "kernel": 3},
    "mobilevit": {"image_size": 64},
    "res18": {"image_size": 8},
    "res34": {"image_size": 8},
    "res50": {"image_size": 8},
    "res101": {"image_size": 8},
    "vgg": {"image_size": 32},
    "fast_cnn": {"image_size": 9, "dim": 96},
}
LARGE = {"res34", "res50", "res101"}  # 21 to 42 million parameters at any size
