"""How the tiny model that ships with the package was made: a tokenizer, an initialisation, an expert to imitate."""
