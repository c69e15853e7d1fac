"""The commands `tfbilevel clean`, `tune` and `few-shot`."""
