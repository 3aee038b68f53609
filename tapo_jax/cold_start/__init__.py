"""How the tiny model that ships with the package was made: a tokenizer, an initialisation, an expert to imitate.

The program is `launch/sft.py`; nothing here is public.
"""

__all__: list[str] = []
