"""The commands, from official files to scores; `python -m smart_fairseq.commands` lists them."""
