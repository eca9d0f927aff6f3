//! Variables that make the launcher of an MPI library call `reverbs remote` where it would call ssh.

/// What a variable is set to.
#[derive(Clone, Copy, Debug)]
enum Value {
    Text(&'static str),
    /// The path of this command.
    Program,
    /// The path and the subcommand, for launchers that split words.
    Agent,
}

/// The subcommand that is called like ssh.
const SUBCOMMAND: &str = "remote";

use Value::{Agent, Program, Text};

/// By launcher. Where one of its variables is set already, the user has other plans, and none is changed.
const LAUNCHERS: [&[(&str, Value)]; 4] = [
    // Open MPI 4. All daemons from the first node: the others have no `reverbs run`.
    &[
        ("OMPI_MCA_plm", Text("rsh")),
        ("OMPI_MCA_plm_rsh_agent", Agent),
        ("OMPI_MCA_plm_rsh_no_tree_spawn", Text("1")),
    ],
    // PRRTE, of Open MPI 5.
    &[
        ("PRTE_MCA_plm", Text("ssh")),
        ("PRTE_MCA_plm_ssh_agent", Agent),
        ("PRTE_MCA_plm_ssh_no_tree_spawn", Text("1")),
    ],
    // Hydra, of MPICH. What it takes for ssh gets an option more than rsh.
    &[
        ("HYDRA_LAUNCHER", Text("rsh")),
        ("HYDRA_LAUNCHER_EXEC", Program),
        ("HYDRA_LAUNCHER_EXTRA_ARGS", Text(SUBCOMMAND)),
    ],
    // Hydra, of Intel MPI.
    &[
        ("I_MPI_HYDRA_BOOTSTRAP", Text("rsh")),
        ("I_MPI_HYDRA_BOOTSTRAP_EXEC", Program),
        ("I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS", Text(SUBCOMMAND)),
    ],
];

/// The variables for a job. `program` is the path of this command.
pub(crate) fn variables(program: &str, is_set: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    LAUNCHERS
        .iter()
        .filter(|launcher| !launcher.iter().any(|(name, _)| is_set(name)))
        .copied()
        .flatten()
        .map(|(name, value)| {
            let value = match value {
                Text(text) => (*text).to_owned(),
                Program => program.to_owned(),
                Agent => format!("{program} {SUBCOMMAND}"),
            };
            ((*name).to_owned(), value)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::variables;

    #[test]
    fn a_launcher_that_the_user_has_told_something_is_left_alone() {
        let all = variables("/bin/reverbs", |_| false);
        let value = |name: &str| {
            let found = all.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.as_str())
        };
        assert_eq!(value("OMPI_MCA_plm_rsh_agent"), Some("/bin/reverbs remote"));
        assert_eq!(value("HYDRA_LAUNCHER_EXEC"), Some("/bin/reverbs"));
        let others = variables("/bin/reverbs", |name| name == "HYDRA_LAUNCHER");
        assert_eq!(others.len(), all.len() - 3);
        assert!(!others.iter().any(|(name, _)| name.starts_with("HYDRA")));
    }
}
