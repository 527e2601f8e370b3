"""mome-icons: named, openly licensed icons, emoji, pictograms and cliparts as an image and text data set.

`python -m mome.icons.build --output DIR` builds it; `compose.compose_icons` draws the training pictures.
"""
