"""A Hugging Face Space, complete: a folder that runs with its own requirements only.

python -m serve space runs/mine --out spaces/mine
python -m serve space exported/mine --out spaces/mine --examples photos/ --push user/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--title")
    parser.add_argument("--sentence", help="below the title")
    parser.add_argument(
        "--examples", type=Path, metavar="FOLDER", help="images that visitors can try, which you may publish"
    )
    parser.add_argument("--license", metavar="ID", help="of the Space, such as apache-2.0")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="put it on the Hub (token: HF_TOKEN or hf auth login)"
    )
    parser.add_argument(
        "--private", choices=["yes", "no"], default="yes", help="of a Space that --push makes"
    )


def run(options: argparse.Namespace) -> int:
    from evaluation.predict import checkpoint_file
    from serve.demo.examples import example_files
    from serve.model_folder import is_exported
    from serve.space.folder import write_space
    from serve.space.push import check_name, push_space

    if options.push:
        check_name(options.push)
    if not is_exported(options.model) and not checkpoint_file(options.model).is_file():
        raise ValueError(f"{options.model} is no run with a checkpoint, no checkpoint and no exported folder")
    examples = example_files(options.examples) if options.examples else []
    has_maps = write_space(
        options.model, options.out, options.title, options.sentence, examples, options.license
    )
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: a Space of {size / 1e6:.1f} MB")
    if not has_maps:
        print("without maps of what the model looked at: its head is not one linear layer behind a pool")
    if options.push:
        print(f"on the Hub: {push_space(options.out, options.push, options.private == 'yes')}")
    else:
        print(f"try it: pip install -r {options.out}/requirements.txt && python {options.out}/app.py")
    return 0
