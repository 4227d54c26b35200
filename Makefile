.PHONY: quickstart test slow lint fix docs setup hooks
quickstart test slow lint fix docs setup hooks:
	@python3 scripts/dev.py $@
