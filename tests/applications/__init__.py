"""Applications that nobody here wrote, each tried by its own client, directly and through Gatehouse.

A program, `NAME.py`, is one application: `serve` starts it, `use` is what its client does and finds.
Both run in `.venv-applications`, which `make applications` and `make applications-light` make; what
they find is compared by `test_light.py`, which every merge runs, and by `test_heavy.py`.
"""
