"""Run the rows × seeds of a sweep in processes, with results in files. The parent process uses no device.

The program is `launch/sweep.py`; nothing here is public.
"""

__all__: list[str] = []
