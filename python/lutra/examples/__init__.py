"""Programs that use lutra for something whole; each is run as ``python -m lutra.examples.<name>``.

``train_lm`` trains a small language model on a text, of memory layers or of dense ones.
"""
