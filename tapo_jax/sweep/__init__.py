"""Rows × seeds in processes, and their results in files. The parent starts no device.

The program is `launch/sweep.py`; nothing here is public.
"""

__all__: list[str] = []
