"""Reference accuracies of the MRL paper: ResNet-50, 40 epochs, ImageNet-1K.

Kusupati et al., arXiv 2205.13147, table 1; the values are those of the plot data in
github.com/RAIVNLab/MRL, commit 9ab343f, Visualization/. FF has a separate model for each width.
"""

DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LINEAR = {
    "MRL": (66.63, 73.53, 75.03, 75.82, 76.30, 76.47, 76.65, 76.76, 76.80),
    "MRL-E": (56.66, 71.94, 74.48, 75.35, 75.80, 76.22, 76.36, 76.48, 76.51),
    "FF": (65.29, 72.85, 74.60, 75.27, 75.29, 75.71, 76.18, 76.63, 76.87),
}
