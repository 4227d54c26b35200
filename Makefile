.PHONY: quickstart test slow lint fix setup hooks
quickstart test slow lint fix setup hooks:
	@python3 scripts/dev.py $@
