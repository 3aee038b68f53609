"""When does credit transfer help? Small simulated worlds of tool use, trained by this project's own arithmetic."""
