"""What a run says of itself at its start."""

import train_ncp_dpo
from ncp.common.config import parse
from ncp.training.summary import describe_loss


def test_beta_is_announced_in_both_conventions():
    paths = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    config = parse(train_ncp_dpo.Config, paths)
    said = describe_loss(config, "auto")
    assert "beta 2500 " in said and "5000" in said and "derivative over 0.016" in said
    assert "eq. 13 as printed" in describe_loss(config, "1")
