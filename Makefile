# The commands of the book; all work is done by book/_tools/build.py.
#   make book                   environment, data, pages, HTML and PDF
#   make test                   environment, data, all fast tests
# PYTHON=python3.12 chooses the interpreter, NAME=… the experiment, ARGS="-k norms" goes to the tests.

PYTHON ?= python3
COMMANDS := book html pdf serve test test-slow lint bench ledger experiment clean

.PHONY: help $(COMMANDS)

help:
	@$(PYTHON) book/_tools/build.py --help

$(COMMANDS):
	@$(PYTHON) book/_tools/build.py $@ $(NAME) $(ARGS)
