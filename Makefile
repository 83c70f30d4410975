# run, test, bench: what README.md says. quick: the units, under a minute. check: linters, types, warnings.
# test-debug, test-asan, test-tsan, test-dax, test-distributed, nightly: docs/architecture.md, "What is tested when".
# man, sdist, wheel, deb, rpm: to install.
# Each target installs what it needs and reads no input. PYTHON names the interpreter to build for, PYTEST_ARGS
# what to pass to pytest; VFSD_BUILD and VFSD_WERROR are for setup.py.

PYTHON ?= python3
PYTEST_ARGS ?=
export PYTHON

venv := .venv
python := $(venv)/bin/python
pip := $(venv)/bin/pip --quiet --disable-pip-version-check --no-input
# Compiled from; a change of a .py file needs no new build.
sources := $(shell find vfsd bench -name '*.pyx' -o -name '*.px[di]' -o -name '*.h') setup.py pyproject.toml
stubs := $(shell find vfsd bench -name '*.pyi')
modules := $(subst /,.,$(stubs:.pyi=))
empty := </dev/null

.PHONY: build run quick test test-debug test-asan test-tsan test-dax test-distributed nightly bench check wheel clean lint types stubs warnings man sdist deb rpm
.DELETE_ON_ERROR:

# Before a command that boots user-mode Linux: where Debian's does not run on this CPU, a newer one.
with_uml = $(python) tools/ensure_uml.py >build/uml.env $(empty); . ./build/uml.env;

build: $(venv)/built

$(venv)/tools: pyproject.toml
	tools/ensure-packages build
	$(PYTHON) -m venv $(venv) $(empty)
	mkdir -p build
	$(python) tools/requirements.py >build/requirements.txt
	$(pip) install -r build/requirements.txt $(empty)
	touch $@

# In place, so that only what has changed is compiled; pip would begin anew each time.
$(venv)/built: $(venv)/tools $(venv)/installed $(sources)
	built=$$(find vfsd bench -name '*.c' -print -quit); \
	$(python) setup.py --quiet build_ext --inplace $(empty) && touch $@ && \
	if [ -z "$$built" ] && [ "$(VFSD_WERROR)" = 1 ]; then touch $(venv)/werror; fi

$(venv)/installed: $(venv)/tools
	VFSD_BUILD=none $(pip) install --no-build-isolation --editable . $(empty)
	touch $@

# Without a guest's packages the built-in guest takes its place.
run: build
	-tools/ensure-packages guest
	$(with_uml) $(python) tools/demo.py $(empty)

# Nothing that boots, mounts or waits: the ring, memory, tables and messages as they are.
units := $(wildcard tests/test_*.py tests/dax/test_window.py tests/vhost/test_messages.py) tests/memory tests/ring \
    tests/virtqueue
quick: build
	$(python) -m pytest $(PYTEST_ARGS) $(units) $(empty)

# The rooms that test-debug runs; TEST_ROOMS=others has `make test` run the rest.
checked := $(addprefix tests/,dax fuse hostfs memory queue ring state vhost virtqueue)
rooms_all := tests
rooms_others = $(filter-out $(checked) %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)) $(wildcard tests/test_*.py))
TEST_ROOMS ?= all

# Without a guest's packages its tests are skipped, each with the reason.
test: build
	-tools/ensure-packages guest
	-tools/ensure-packages libvirt
	$(with_uml) $(python) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) $(rooms_$(TEST_ROOMS)) $(empty)

# By builds of their own, beside the one in place: bounds checks, assertions, tables that have to be empty at
# the end (debug), the same with the address and undefined-behaviour sanitizers (asan).
test-debug: build/debug/built
	-tools/ensure-packages guest
	$(call by_build,debug) $(python) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) $(checked) $(empty)

# Leaks are what tables have to be empty for; vfsd has a SIGBUS handler of its own.
sanitizers = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
test-asan: build/asan/built
	-tools/ensure-packages guest
	$(sanitizers) $(call by_build,asan) $(python) -m pytest $(PYTEST_ARGS) $(checked) tests/guest tests/cli $(empty)

# Data races between the threads of a server, which the first one ends (status 66). Its frames are numbers there, as
# it has no path to look their names up: addr2line -fie build/tsan/vfsd/... NUMBER. The sanitizer wants addresses
# where Linux put them before it chose them at random.
tsan = LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
    TSAN_OPTIONS=halt_on_error=1:history_size=4:suppressions=$(CURDIR)/tests/tsan.supp
test-tsan: build/tsan/built
	$(tsan) $(call by_build,tsan) setarch --addr-no-randomize \
	    $(python) -m pytest $(PYTEST_ARGS) tests/ring tests/queue $(empty)

by_build = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/$(1)
build/%/built: $(venv)/installed $(sources) $(shell find vfsd bench -name '*.py')
	mkdir -p build/$*/vfsd build/$*/bench
	find build/$*/vfsd build/$*/bench -type f ! -name '*.so' ! -name '*.c' -delete
	for made in $$(find build/$*/vfsd build/$*/bench -name '*.c'); do \
	    [ -e "$${made#build/$*/}" ] || rm "$$made"; done
	tar -c --exclude='*.so' --exclude='*.c' --exclude=__pycache__ vfsd bench setup.py pyproject.toml README.md | tar -x -C build/$*
	ln -sfn bench build/$*/vfsd_bench
	cd build/$* && VFSD_BUILD=$* ../../$(python) setup.py --quiet build_ext --inplace $(empty)
	touch $@

# Hours, as root: what changes seldom, or takes long to find.
nightly: test-debug test-asan test-tsan test-dax test-distributed wheel rpm
	tools/ensure-packages cross
	tools/try-cross
	tools/try-debian forky quick
	tools/try-debian bookworm deb
	tools/try-debian trixie deb
	VFSD_SOAK=600 $(python) -m pytest tests/fuse/test_soak.py $(PYTEST_ARGS) $(empty)

# Guests of two hosts on a GlusterFS volume, in namespaces that end with it; without glusterd it is skipped.
test-distributed: build
	-tools/ensure-packages guest distributed
	VFSD_OWN_NAMESPACES=1 unshare --net --mount --pid --fork --mount-proc --kill-child \
	    sh -c '"$$@"; exit $$?' reaper $(python) -m pytest -m distributed tests/distributed $(PYTEST_ARGS) $(empty)

# A Linux guest with a DAX window, once for each change of what it touches; without debootstrap or a
# mirror that has QEMU 11.1 it is skipped, with the reason. VFSD_DAX_GUEST: a folder to keep it in.
test-dax: build/dax-tested

build/dax-tested: build $(shell find vfsd tools/guests tests/linux -name '*.py' -o -name '*-dax-guest' \
    -o -name 'qemu-shmem.c') $(wildcard bench/levels/*dax*.py) $(sources)
	-tools/ensure-packages guest dax
	$(python) -m pytest --dax -m dax tests/linux tests/bench $(PYTEST_ARGS) $(empty)
	mkdir -p build
	touch $@

# The quick profile: vfsd, the peers that are installed, and bare system calls; minutes.
bench: build
	-tools/ensure-packages guest
	$(with_uml) $(venv)/bin/vfsd bench --profile quick --json build/bench.json --html build/bench.html $(empty)

check: lint types stubs warnings

lint: $(venv)/tools
	$(venv)/bin/ruff check .

types: $(venv)/tools
	$(venv)/bin/mypy --strict
	$(venv)/bin/mypy --strict bench
	MYPYPATH=tools:tests:tests/linux $(venv)/bin/mypy --strict --explicit-package-bases \
	    tools/guests tools/*.py tests/docs tests/linux tests/package

# A stub promises what others may use; a module of Cython's has more names than that.
stubs: build
	$(python) -m mypy.stubtest --concise --ignore-missing-stub $(modules)

# A build of its own, because Cython prints no warning for a file it need not translate again;
# VFSD_WERROR=1 make build, where nothing has been built yet, is one.
warnings: $(venv)/werror

$(venv)/werror: $(venv)/tools $(sources)
	rm -rf build/werror
	mkdir -p build/werror
	cp -r vfsd bench setup.py pyproject.toml $(wildcard README.md) build/werror
	find build/werror '(' -name '*.c' -o -name '*.so' ')' -delete
	cd build/werror && VFSD_WERROR=1 ../../$(python) setup.py --quiet build_ext $(empty)
	touch $@

# The commands' manual pages and completions, beside those in man/ that are written by hand.
man: man/vfsd.1

man/vfsd.1: build tools/manpages.py $(shell find vfsd/cli vfsd/options -name '*.py')
	$(python) tools/manpages.py man $(empty)

sdist: man
	rm -f dist/*.tar.gz
	$(python) setup.py --quiet sdist $(empty)

# For this Python and for systems whose C library is not older than this one's, without what a debugger needs.
wheel: sdist
	tools/ensure-packages wheel
	$(pip) install auditwheel $(empty)
	CFLAGS="$${CFLAGS--O2} -g0" $(pip) wheel --no-deps --no-build-isolation --wheel-dir build/wheels dist/*.tar.gz $(empty)
	$(python) -m auditwheel --quiet repair --strip --wheel-dir dist build/wheels/*.whl $(empty)

# Debian packages for the Debian that this runs on.
deb: sdist
	tools/ensure-packages deb
	packaging/make-deb dist/*.tar.gz dist

# RPM packages for this Python; for a distribution from the same spec and sdist.
rpm: sdist
	tools/ensure-packages rpm
	PYTHON=$(python) packaging/make-rpm dist/*.tar.gz dist

clean:
	rm -rf $(venv) build dist .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vfsd bench tools tests -name __pycache__ -prune -exec rm -rf {} +
	rm -rf man/*.1 man/*.5 man/bash man/fish man/zsh
	find vfsd bench '(' -name '*.so' -o -name '*.c' ')' -delete
