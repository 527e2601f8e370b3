"""What runs without this project's code: the towers and a step of captioning, as graphs of any batch and length.

- `modules`: `ImageTower`, `TextTower`, `CaptionStep`, each with its names, sample inputs and dynamic shapes.
"""
