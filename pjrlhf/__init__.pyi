# The public names of the package, by subject; each is imported at its first use.
# ruff: noqa: I001

__version__: str

# Models and adapters
from .language_model import LanguageModel as LanguageModel
from .language_model import load_bank as load_bank
from .language_model import load_model as load_model
from .language_model import load_personal as load_personal
from .models.adapters import AdapterConfig as AdapterConfig
from .models.adapters import Backbone as Backbone
from .models.adapters import Policies as Policies
from .models.adapters import init_bank as init_bank
from .models.peft import load_peft as load_peft
from .models.peft import save_peft as save_peft

# Users
from .models.registry import UserRegistry as UserRegistry
from .models.users import UserModel as UserModel
from .models.users import gather_rows as gather_rows

# Sampling
from .rollout.sampler import Sampling as Sampling
from .rollout.sampler import generate as generate

# Objectives
from .algorithms.ppo import PPOConfig as PPOConfig
from .algorithms.ppo import ppo_update as ppo_update
from .objectives.preference import PAIRWISE as PAIRWISE
from .objectives.preference import bradley_terry_loss as bradley_terry_loss
from .objectives.preference import implicit_rewards as implicit_rewards
from .objectives.preference import pairwise_loss as pairwise_loss
from .objectives.scalarization import RULES as RULES
from .objectives.scalarization import CombinationRule as CombinationRule
from .objectives.scalarization import make_rule as make_rule

# Merging
from .export.merge import MergeSettings as MergeSettings
from .export.merge import merge as merge
from .merging.methods import dare as dare
from .merging.methods import model_stock as model_stock
from .merging.methods import slerp as slerp
from .merging.methods import ties as ties
from .merging.trees import soup as soup
from .merging.trees import weighted_sum as weighted_sum

# Runs and extensions
from .config_files import load_config as load_config
from .errors import UserError as UserError
from .pipeline.stages import run as run
from .registry import Registry as Registry
from .runtime.run import Stage as Stage
from .runtime.run import Trainer as Trainer
from .settings import Settings as Settings
from .settings import setting as setting
from .training.loop import Method as Method
from .training.state import State as State
