"""Make the tiny model that ships with the package: a tokenizer, an initialisation, an expert to imitate.

The program is `launch/sft.py`; nothing here is public.
"""

__all__: list[str] = []
