"""Fixtures of infra's tests, here so that their modules share one local AWS."""

from tests.integration.infra.terraform import cloud, terraform_environment

__all__ = ["cloud", "terraform_environment"]
