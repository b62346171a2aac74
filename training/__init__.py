"""Trains the small language model that ships in `models/`.

Run `python -m training.train --corpus DIR --out DIR --minutes N`, then
`python -m training.export --run DIR --out models/NAME`.
"""
