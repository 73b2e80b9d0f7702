"""The compiled kernels; all else about the package stands in pyproject.toml.

The extension is optional: where there is no compiler for it, hlwq is installed without, and runs in plain torch. It
uses Python's stable interface, so that one wheel serves all versions of Python.
"""

import sys
import sysconfig

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
# The same bits everywhere: see native.cpp.
FLAGS += ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno"]

stable = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has no stable interface yet
setup(
    ext_modules=[
        Extension(
            "hlwq.kernels._native",
            ["src/hlwq/kernels/native.cpp"],
            depends=["src/hlwq/kernels/native_loops.h"],
            language="c++",
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if stable else [],
            extra_compile_args=FLAGS,
            libraries=["dl"] if sys.platform == "linux" else [],
            py_limited_api=stable,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable else {},
)
