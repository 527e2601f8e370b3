"""What runs without this project's code: the towers and a step of captioning, as graphs of any batch and length.

- `modules`: `ImageTower`, `TextTower`, `CaptionStep` and those of CoCa, each with its names, sample inputs and dynamic
  shapes.
"""
