# make            static release build; prints where the program lies
# make install    PREFIX=/usr/local DESTDIR=
# make traffic    the same, and the demonstrations' sender and receiver
# make test       everything, as root (tests/run)
# make clean

PREFIX ?= /usr/local
CARGO ?= cargo
RUSTC ?= rustc
INSTALL ?= install

# The musl target where it is installed, else glibc. An explicit target in both cases: without one the flag for static
# linking would reach procedural macros too, which have to be dynamic.
HOST := $(shell $(RUSTC) --print host-tuple)
MUSL := $(firstword $(subst -, ,$(HOST)))-unknown-linux-musl
HAVE_MUSL := $(wildcard $(shell $(RUSTC) --print target-libdir --target $(MUSL) 2>/dev/null)/libstd-*)
TARGET ?= $(if $(HAVE_MUSL),$(MUSL),$(HOST))

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
PROGRAM := $(TARGET_DIR)/$(TARGET)/release/mptcp-hook

export RUSTFLAGS := $(strip $(RUSTFLAGS) -C target-feature=+crt-static)

.PHONY: all traffic install test clean

all:
	$(CARGO) build --release --locked --target $(TARGET)
	@echo $(PROGRAM)

# The same, and the program that moves real Multipath TCP in demonstrations and tests; prints where both lie.
traffic:
	$(CARGO) build --release --locked --target $(TARGET) --bins --example mptcp-traffic
	@echo $(PROGRAM)
	@echo $(TARGET_DIR)/$(TARGET)/release/examples/mptcp-traffic

# Built by whoever runs `make` first, so that `sudo make install` needs no Rust.
install:
	@test -x $(PROGRAM) || { echo "$(PROGRAM) is not there: run make first" >&2; exit 1; }
	$(INSTALL) -D -m 755 $(PROGRAM) $(DESTDIR)$(PREFIX)/bin/mptcp-hook
	find hooks -type f -exec $(INSTALL) -D -m 644 {} $(DESTDIR)$(PREFIX)/share/mptcp-hook/{} \;
	for unit in hooks/systemd/*.*; do \
	  sed 's|/usr/local/bin/|$(PREFIX)/bin/|' "$$unit" | $(INSTALL) -D -m 644 /dev/stdin "$(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}" && \
	  sed 's|/usr/local/bin/|$(PREFIX)/bin/|' "hooks/systemd/user/$${unit##*/}" | $(INSTALL) -D -m 644 /dev/stdin "$(DESTDIR)$(PREFIX)/lib/systemd/user/$${unit##*/}" || exit 1; \
	done
	$(INSTALL) -D -m 644 README.md $(DESTDIR)$(PREFIX)/share/doc/mptcp-hook/README.md
	$(INSTALL) -D -m 644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/mptcp-hook/LICENSE

test:
	./tests/run

clean:
	$(CARGO) clean
