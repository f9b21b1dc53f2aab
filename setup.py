"""Cython extensions, OpenMP and the place of ``marlin_cy.opencl``.

There are no ISA flags here: the C files of ``marlin_cy/cpu/ukernels`` set them for each function, so that one build
runs on every CPU of its architecture.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

UKERNELS = sorted(str(path) for path in Path("marlin_cy/cpu/ukernels").glob("*.c"))
HEADERS = sorted(str(path) for path in Path("marlin_cy").rglob("*.h"))
# In a clone, marlin_cy/opencl is a link to opencl/, so all packages lie below this folder. An editable install then
# adds this folder to the path, which type checkers and editors understand. Without the link (in an sdist, or where a
# clone has no symbolic links), setuptools is told where the package is.
LINKED = Path("marlin_cy/opencl/__init__.py").exists()
PACKAGE_DIR = {"": "."} if LINKED else {"marlin_cy": "marlin_cy", "marlin_cy.opencl": "opencl"}
OPENMP_PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"

# Products and sums are fused where the source says fmaf and nowhere else: results must not depend on the compiler.
# Python's own flags may ask for debug information, which takes a quarter of the time to compile.
GCC_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
MSVC_FLAGS = ["/O2", "/fp:precise"]
# The module that holds Cython's own code for memoryviews, once. Compiled into every module, the code would take half of
# the time.
SHARED = "marlin_cy._cyutility"


def extension(name, sources=(), package="cpu"):
    folder = "opencl" if package == "opencl" else f"marlin_cy/{package.replace('.', '/')}"
    return Extension(
        f"marlin_cy.{package}.{name}",
        [f"{folder}/{name}.pyx", *sources],
        include_dirs=[np.get_include(), "marlin_cy/cpu/ukernels", folder],
        depends=HEADERS,
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
    )


def fork_is_the_default():
    """Whether new processes start with what this one has. Otherwise each would run this file, and build again."""
    return multiprocessing.get_context().get_start_method() == "fork"


class BuildExt(build_ext):
    """Adds the compiler's flags, and OpenMP if the compiler supports it. Compiles all C files in one pool of threads.

    setuptools has a thread for each extension, which compiles the extension's files one after the other. The files of
    `_dispatch` take most of the time.
    """

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        msvc = self.compiler.compiler_type == "msvc"
        compile_args, link_args = self.openmp_flags(msvc)
        if os.environ.get("MARLIN_CY_SANITIZE"):
            sanitize = [f"-fsanitize={os.environ['MARLIN_CY_SANITIZE']}", "-fno-omit-frame-pointer", "-g", "-O1"]
            compile_args, link_args = compile_args + sanitize, link_args + sanitize
        for ext in self.extensions:
            ext.extra_compile_args = (MSVC_FLAGS if msvc else GCC_FLAGS) + compile_args
            if ext.name == SHARED and not msvc:
                ext.extra_compile_args.append("-O1")  # no loops over weights or activations
            ext.extra_link_args = link_args
        with ThreadPoolExecutor(self.parallel) as pool:
            self.compiler.compile = partial(self.compile_in, pool, self.compiler.compile)
            self.parallel = len(self.extensions)  # the extensions' threads wait for the pool, and then link
            super().build_extensions()

    @staticmethod
    def compile_in(pool, compile, sources, **options):
        """Compile each source in the pool. Returns the names of the object files; raises what ``compile`` raises."""
        jobs = [pool.submit(compile, [source], **options) for source in sources]
        return [name for job in jobs for name in job.result()]

    def openmp_flags(self, msvc):
        if msvc:
            return ["/openmp"], []
        candidates = [(["-fopenmp"], ["-fopenmp"])]
        if sys.platform == "darwin":
            candidates.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            for compile_args, link_args in candidates:
                command = [*self.compiler.compiler_so, *compile_args, str(source), "-o", f"{folder}/probe", *link_args]
                if subprocess.run(command, capture_output=True).returncode == 0:
                    return compile_args, link_args
        print("warning: no OpenMP with this compiler: marlin_cy will run on one thread", file=sys.stderr)
        return [], []


setup(
    packages=[
        "marlin_cy",
        "marlin_cy.checkpoints",
        "marlin_cy.checkpoints.gguf",
        "marlin_cy.commands",
        "marlin_cy.cpu",
        "marlin_cy.cpu.decoder",
        "marlin_cy.cpu.measure",
        "marlin_cy.decoder",
        "marlin_cy.distributed",
        "marlin_cy.formats",
        "marlin_cy.integrations",
        "marlin_cy.integrations.vllm",
        "marlin_cy.moe",
        "marlin_cy.opencl",
        "marlin_cy.opencl.checks",
        "marlin_cy.opencl.decoder",
        "marlin_cy.opencl.gemm",
        "marlin_cy.opencl.layer",
        "marlin_cy.opencl.tiers",
        "marlin_cy.serve",
        "marlin_cy.stacks",
        "marlin_cy.weights",
    ],
    package_dir=PACKAGE_DIR,
    # The sdist holds all sources (MANIFEST.in); an installed package holds only these files.
    include_package_data=False,
    package_data={
        "": ["*.pyi"],
        "marlin_cy": ["data/*/*", "data/*/*/*", "py.typed"],
        "marlin_cy.checkpoints.gguf": ["*.pyi"],
        "marlin_cy.cpu": ["*.pxd", "*.pyi"],
        "marlin_cy.cpu.decoder": ["*.pxd", "*.pyi"],
        "marlin_cy.cpu.measure": ["*.pyi"],
        "marlin_cy.moe": ["*.pyi"],
        "marlin_cy.opencl": ["kernels/*.cl", "*.pyi"],
        "marlin_cy.serve": ["page.html"],
        "marlin_cy.stacks": ["*.pxd", "*.pyi"],
        "marlin_cy.weights": ["*.pyi"],
    },
    ext_modules=cythonize(
        # Those that take the longest to compile come first.
        [
            extension("_dispatch", UKERNELS),
            Extension(SHARED, [f"{SHARED.replace('.', '/')}.c"]),  # Cython writes this file, into build_dir
            extension("_workspace"),
            extension("_buffers"),
            extension("_store"),
            extension("_quantize"),
            extension("_gemm"),
            extension("_arena"),
            extension("_team"),
            extension("_rows"),
            extension("_products"),
            extension("_routing"),
            extension("_combine"),
            extension("_dense"),
            extension("_exchange"),
            extension("_operations"),
            extension("_attention"),
            extension("_block_attention"),
            extension("_layer"),
            extension("_attention", package="cpu.decoder"),
            extension("_cache", package="cpu.decoder"),
            extension("_delta", package="cpu.decoder"),
            extension("_ffn", package="cpu.decoder"),
            extension("_grouped", package="cpu.decoder"),
            extension("_latent", package="cpu.decoder"),
            extension("_norm", package="cpu.decoder"),
            extension("_projections", package="cpu.decoder"),
            extension("_step", package="cpu.decoder"),
            extension("_blocks", package="checkpoints.gguf"),
            extension("_align", package="moe"),
            extension("_dispatches", package="stacks"),
            extension("_launches", package="opencl"),
            extension("_bandwidth", package="cpu.measure"),
            extension("_peak", package="cpu.measure"),
            extension("_nibbles", package="weights"),
        ],
        language_level=3,
        shared_utility_qualified_name=SHARED,
        compiler_directives={
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
        build_dir="build/cython",
        nthreads=os.cpu_count() if fork_is_the_default() else 0,
    ),
    cmdclass={"build_ext": BuildExt},
)
