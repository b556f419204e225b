"""Finds a kernel with its modules for a guest, and fetches Debian's without being root."""

from __future__ import annotations

import os
import sys

from vmm.arch.base import native_kernels
from vmm.errors import HostError
from vmm.guest.cache import cache_dir
from vmm.guest.modules import ModuleTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_IMAGE_PREFIX = "vmlinuz-"

#: As ``kernel``: the newest of this machine that will do.
HOST = "host"


class KernelTree:
    """A bootable image and the modules made with it: ``version``, ``image``, ``modules_dir``, each
    of them but the image perhaps empty."""

    __slots__ = ("_modules", "image", "modules_dir", "version")

    def __init__(self, version: str, image: str, modules_dir: str) -> None:
        self.version = version
        self.image = image
        self.modules_dir = modules_dir
        self._modules: ModuleTree | None = None

    @property
    def modules(self) -> ModuleTree:
        """The modules, read once. HostError when their directory is gone."""
        if self._modules is None:
            self._modules = ModuleTree(self.modules_dir)
        return self._modules

    def __repr__(self) -> str:
        return f"KernelTree({self.version!r}, {self.image!r}, {self.modules_dir!r})"


def _advice() -> str:
    return f"install linux-image-{native_kernels().DEBIAN} (Debian), or name one with --kernel"


def packages_dir() -> str:
    """Where ``fetch_debian_kernel`` unpacks packages."""
    return os.path.join(cache_dir(), "kernel-packages")


def find_kernel(need: list[str], kernel: str | None = None) -> KernelTree:
    """A kernel that can be read and has all modules in ``need`` (or has them built in).

    Looked at in this order: ``kernel``, $VMM_NESTED_KERNEL (each an image or a directory with
    boot/ and lib/modules/ in it), the packages fetched before, and /boot. A kernel that was
    named must do; otherwise the newest that does is taken.

    Raises:
        HostError: none is there; says what is missing and what to install.
    """
    named = kernel or os.environ.get("VMM_NESTED_KERNEL")
    if named:
        trees = list(_trees_at(named))
        if not trees:
            raise HostError(
                f"There is no kernel with its modules at {named}: give an image next to its "
                "/lib/modules, or a directory with boot/vmlinuz-* and lib/modules/ in it"
            )
    else:
        trees = [*_fetched(), *_in_directory("/")]
    return _first_that_does(trees, need, "the nested machine")


def _first_that_does(trees: list[KernelTree], need: list[str], who: str) -> KernelTree:
    reason = "none is installed"
    for tree in trees:
        missing = [name for name in need if not tree.modules.has(name)]
        if missing:
            reason = f"{tree.version} has no {', '.join(missing)}"
        elif not os.access(tree.image, os.R_OK):
            reason = f"{tree.image} cannot be read"
        else:
            return tree
    raise HostError(f"No kernel for {who} ({reason}): {_advice()}")


def guest_kernel(kernel: str | None, need: list[str]) -> KernelTree:
    """The kernel that ``vmm run --kernel`` means.

    ``host`` or None is the newest of this machine (in /boot, in /lib/modules, or fetched before)
    that has the modules ``need``. A path is an image, with modules from the tree it lies in or
    from /lib/modules; a directory is a build tree or an unpacked package; a .deb is unpacked into
    the cache. What is named is taken as it is: it may have built in what it needs.

    Raises:
        HostError: there is none, or it cannot be read.
    """
    if kernel is None or kernel == HOST:
        trees = [*_in_directory("/"), *_in_lib_modules("/lib/modules"), *_fetched()]
        return _first_that_does(trees, need, "the guest")
    if os.path.isdir(kernel):
        found = _build_tree(kernel) or next(iter(_in_directory(kernel)), None)
        if found is None:
            raise HostError(
                f"--kernel {kernel}: there is no {native_kernels().BUILD_IMAGE} in this directory "
                "(a build tree after make) and no boot/vmlinuz-* (an unpacked package)"
            )
        return found
    if kernel.endswith(".deb"):
        return _in_package(kernel)
    return _image(kernel)


def _image(path: str) -> KernelTree:
    for tree in _trees_at(path):
        return tree
    full = os.path.realpath(path)
    inside = f"/{native_kernels().BUILD_IMAGE}"
    if full.endswith(inside):
        built = _build_tree(full.removesuffix(inside))
        if built is not None:
            return built
    version = _version_of(path)
    modules = f"/lib/modules/{version}"
    return KernelTree(version, path, modules if version and os.path.isdir(modules) else "")


def _version_of(path: str) -> str:
    """By the image's own header; empty when it has none."""
    from vmm.arch.source import Source
    from vmm.errors import BootError

    try:
        with Source.open(path, "kernel") as source:
            return native_kernels().release(source).partition(" ")[0]
    except BootError:
        pass  # the loader will say it better
    return ""


def _build_tree(top: str) -> KernelTree | None:
    """A kernel where it was built, modules included."""
    image = os.path.join(top, native_kernels().BUILD_IMAGE)
    if not os.path.exists(image):
        return None
    try:
        with open(os.path.join(top, "include/config/kernel.release"), encoding="utf-8") as file:
            version = file.read().strip()
    except OSError:
        version = ""
    return KernelTree(version, image, top if _has(top, "modules.order") else "")


def _has(top: str, name: str) -> bool:
    return os.path.exists(os.path.join(top, name))


def _in_lib_modules(top: str) -> list[KernelTree]:
    """Where distributions put the image beside its modules, newest first."""
    try:
        versions = sorted(os.listdir(top), key=version_key, reverse=True)
    except OSError:
        return []
    paths = [(version, os.path.join(top, version)) for version in versions]
    return [
        KernelTree(version, os.path.join(path, "vmlinuz"), path)
        for version, path in paths
        if _has(path, "vmlinuz")
    ]


def _in_package(path: str) -> KernelTree:
    """A kernel package of Debian's, unpacked once."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise HostError(f"--kernel {path} cannot be read: {error.strerror}") from error
    name = os.path.basename(path).removesuffix(".deb")
    target = os.path.join(cache_dir(), "kernel-files", f"{name}-{info.st_size}-{info.st_mtime_ns}")
    if not os.path.isdir(target):
        _need_tools("dpkg-deb")
        _unpack(path, target)
    trees = _in_directory(target)
    if not trees:
        raise HostError(f"--kernel {path}: there is no boot/vmlinuz-* in this package")
    return trees[0]


def _unpack(deb: str, target: str) -> None:
    import shutil

    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{name}.{os.getpid()}.new")
    os.makedirs(partial)
    try:
        _output("dpkg-deb", "-x", deb, partial)
        try:
            os.rename(partial, target)
        except OSError:
            if not os.path.isdir(target):  # somebody else was faster: theirs is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _trees_at(path: str) -> Iterator[KernelTree]:
    if os.path.isdir(path):
        yield from _in_directory(path)
        return
    name = os.path.basename(path)
    if not os.path.isfile(path) or not name.startswith(_IMAGE_PREFIX):
        return
    version = name[len(_IMAGE_PREFIX) :]
    top = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    for base in (top, "/"):
        modules = os.path.join(base, "lib/modules", version)
        if os.path.isdir(modules):
            yield KernelTree(version, path, modules)
            return


def _in_directory(top: str) -> list[KernelTree]:
    """The kernels of a tree laid out as / is, newest first."""
    found = []
    try:
        names = os.listdir(os.path.join(top, "boot"))
    except OSError:
        return []
    for name in names:
        version = name[len(_IMAGE_PREFIX) :]
        for lib in ("lib/modules", "usr/lib/modules"):
            modules = os.path.join(top, lib, version)
            if name.startswith(_IMAGE_PREFIX) and os.path.isdir(modules):
                found.append(KernelTree(version, os.path.join(top, "boot", name), modules))
                break
    return sorted(found, key=lambda tree: version_key(tree.version), reverse=True)


def _fetched() -> list[KernelTree]:
    try:
        packages = os.listdir(packages_dir())
    except OSError:
        return []
    trees = []
    for package in packages:
        if not package.startswith("."):
            trees += _in_directory(os.path.join(packages_dir(), package))
    return sorted(trees, key=lambda tree: version_key(tree.version), reverse=True)


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Sorts versions as people do: 6.1.0-9 before 6.1.0-10."""
    key: list[tuple[int, int, str]] = []
    word = ""
    for char in version + ".":
        if word and char.isdigit() == word[-1].isdigit() and char.isalnum():
            word += char
            continue
        if word:
            key.append((1, int(word), "") if word[0].isdigit() else (0, 0, word))
        word = char if char.isalnum() else ""
    return key


def fetch_debian_kernel(flavour: str = "") -> KernelTree:
    """Download Debian's newest kernel package of a flavour and unpack it into the cache.

    ``flavour`` is what follows linux-image- in the package's name; empty is the generic kernel.
    Needs apt and dpkg-deb but not root; says on stderr what it does; does nothing when one was
    fetched before.

    Raises:
        HostError: apt does not know the package, or a step failed.
    """
    flavour = flavour or native_kernels().DEBIAN
    for tree in _fetched():
        # VERSION-ABI-FLAVOUR, where the flavour may have a dash
        if tree.version.split("-", 2)[2:] == [flavour]:
            return tree
    _need_tools("apt-cache")
    target = fetch_package(_newest_package(flavour))
    trees = _in_directory(target)
    if not trees:
        raise HostError(f"{target} has no kernel in it: remove the directory and try again")
    return trees[0]


def fetch_package(package: str) -> str:
    """Download a Debian package and unpack it into the cache, without being root.

    Gives the directory its files are in (``usr/...`` below it); says on stderr what it does, and
    does nothing when the package is there already. Raises HostError.
    """
    target = os.path.join(packages_dir(), package)
    if not os.path.isdir(target):
        _need_tools("apt-get", "dpkg-deb")
        _download(package, target)
    return target


def _need_tools(*tools: str) -> None:
    import shutil

    for tool in tools:
        if shutil.which(tool) is None:
            raise HostError(f"Fetching from Debian needs {tool}, which is not here: {_advice()}")


def _newest_package(flavour: str) -> str:
    """The package that linux-image-FLAVOUR stands for, such as linux-image-6.1.0-56-FLAVOUR."""
    meta = f"linux-image-{flavour}"
    names = []
    for line in _output("apt-cache", "depends", "--important", meta).splitlines():
        word, _, name = line.strip().partition(": ")
        if word == "Depends" and name.startswith("linux-image-"):
            names.append(name)
    if not names:
        raise HostError(f"apt knows no package {meta}: run `apt-get update` as root first")
    return names[0]


def _download(package: str, target: str) -> None:
    import shutil

    work = os.path.join(packages_dir(), f".{package}.{os.getpid()}")
    os.makedirs(work)
    try:
        print(f"vmm: downloading {package} into {packages_dir()}", file=sys.stderr, flush=True)
        # --download-only works as any user; apt's own sandbox user cannot write to our cache.
        _output("apt-get", "-q", "-o", "APT::Sandbox::User=", "download", package, cwd=work)
        debs = [name for name in os.listdir(work) if name.endswith(".deb")]
        if len(debs) != 1:
            raise HostError(f"apt-get download {package} left {len(debs)} packages in {work}")
        _unpack(os.path.join(work, debs[0]), target)
        print(f"vmm: {package} is ready in {target}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _output(*argv: str, cwd: str | None = None) -> str:
    import subprocess

    result = subprocess.run(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise HostError(f"`{' '.join(argv)}` failed with status {result.returncode}: {said}")
    return result.stdout
