"""Check whether a run fits its machines and how fast it can be: its real programs, compiled for a TPU without a TPU.

The program is `launch/compile_check.py`; nothing here is public.
"""

__all__: list[str] = []
