# Thin on purpose: what these do is in xtask.

PREFIX ?= /usr/local
export DESTDIR

.PHONY: build install uninstall check test demo bench clean

# All programs, in release, in target/dist.
build:
	cargo xtask dist --release

# What `make build` made, below $(DESTDIR)$(PREFIX). As root where that needs root; builds nothing, so that root does not.
install:
	cargo xtask install "$(PREFIX)"

uninstall:
	cargo xtask uninstall "$(PREFIX)"

# Formatting, lints, licences, documentation.
check:
	cargo xtask check

# Everything that proves that banger works, real guests under emulation included.
test:
	cargo xtask test

# From nothing to a command run in a VM.
demo:
	cargo xtask demo

# Ratios against the bare thing.
bench:
	cargo xtask bench

clean:
	cargo clean
