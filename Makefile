# The front door. Every target is one script or one cargo call that also works
# alone; each script says in its head what it does and which environment
# variables it knows. Parallelism: RQCOW2_JOBS, default all CPUs.

.PHONY: help deps build tool stock plain demo install check iotests iotests-all bench study soak clean

help:
	@echo 'make demo     from nothing to a guest on a chain of 300 layers, and what it costs'
	@echo 'make check    every test: format, lints, unit, differential, iotests'
	@echo 'make iotests  upstream'"'"'s iotests, with the C driver and with the Rust driver, side by side'
	@echo 'make iotests-all  the same with images made with other options, hours'
	@echo 'make bench    measurements beside unpatched QEMU; table and build/bench.json'
	@echo 'make study    what a chain costs and why: docs/study.md with figures, measured on this'
	@echo '              machine; QUICK=1 for less than 15 minutes'
	@echo 'make soak     ten rounds of everything on a chain of 1000 layers in use, by threads,'
	@echo '              by a guest with queues in two I/O threads, by one behind'
	@echo '              vhost-user; twenty with libvirt, if it is there; one of 10,000;'
	@echo '              damaged images, and power that fails, an hour each;'
	@echo '              then random operations beside the C driver, 4 hours'
	@echo
	@echo 'make deps     Debian packages, Python environment, Rust toolchain'
	@echo 'make build    the patched programs, in build/bin'
	@echo 'make tool     qcow2-chain, its man pages and completions, in build/bin and build/share'
	@echo 'make stock    the unpatched programs, same configuration, in build/stock/bin'
	@echo 'make install  programs, firmware and qcow2-chain below PREFIX, default /opt/rqcow2'
	@echo 'make plain    the patched tree with the driver left out, in build/plain/bin'
	@echo 'make clean    removes build/ and target/; the cache stays'
	@echo
	@echo 'Sources and object files: $${RQCOW2_CACHE:-~/.cache/rqcow2}'

deps:
	ci/deps

build: deps
	ci/build

tool:
	ci/tool

stock: deps
	ci/build stock

plain: deps
	ci/build plain

install: deps
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' ci/install

demo:
	ci/demo

check:
	ci/check

iotests:
	ci/iotests --both

iotests-all:
	ci/iotests-all

bench: deps
	bench/build
	bench/run

study: deps
	bench/build
	study/deps
	study/run $(if $(QUICK),--quick)

soak:
	tests/soak
	tests/soak --machine
	tests/soak --machine --scsi
	tests/soak --vhost-user
	tests/libvirt --layers 190 --rounds 20
	tests/fuzz --time 3600 --keep
	tests/powerloss --time 3600
	RQCOW2_LAYERS=10000 ci/iotests --own rqcow2-deepest --timeout 3600
	tests/differential --time 14400

clean:
	rm -rf build target
